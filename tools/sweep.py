"""Queue an experiment for each combination of the values, run all that are queued, and print their table.

    python tools/sweep.py [--name NAME] KEY=VALUE[,VALUE …] …      (make sweep SET="train.lr=1.0e-3,3.0e-4 lora.r=8,16")

All combinations are checked before the first is queued. Exit code 1 if an experiment failed.

Reads   params.yaml
Writes  DVC's experiments, NAME-1, NAME-2 …; nothing in the working tree
"""

from trnlora.cli import script_parser
from trnlora.errors import UserError, run
from trnlora.reporting.experiments import check_changes, queue, run_queued, show_experiments


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--name", help="the experiments' name (default: DVC makes one up)")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUES", help="as for --set-param of `dvc exp run`")
    args = parser.parse_args()
    if not args.changes:
        raise UserError('name the params to change, e.g. make sweep SET="train.lr=1.0e-3,3.0e-4"')
    check_changes(args.changes)
    queue(args.changes, args.name)
    try:
        run_queued()
    finally:
        show_experiments()


if __name__ == "__main__":
    run(main)
