"""Print the experiments on the current commit as a table: changed params, scores, the validation loss, lowest first.

    python tools/experiments.py      (make experiments)

`dvc exp show` with the columns that matter. Left out are times, scores by category, and scores of the base model, which
are the same in all experiments.
"""

from trnlora.cli import script_parser
from trnlora.errors import run
from trnlora.reporting.experiments import show_experiments


def main() -> None:
    script_parser(__doc__).parse_args()
    show_experiments()


if __name__ == "__main__":
    run(main)
