"""Print the metrics of the last run as tables: stage by stage, then base model against adapter.

    python tools/show_metrics.py

A line `stale: …` names what changed since.

Reads   metrics/*.json, metrics/timing/*.json (as `dvc metrics show` and `dvc metrics diff` do), dvc.lock and the files
        that it names
"""

import sys

from rich.console import Console

from trnlora import paths
from trnlora.cli import script_parser
from trnlora.errors import run
from trnlora.reporting.results import load_results
from trnlora.reporting.tables import metrics_table, scores_table


def main() -> None:
    script_parser(__doc__).parse_args()
    now = load_results()
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(metrics_table(now))
    if scores := scores_table(now):
        console.print(scores)
    for note in now.notes:
        print(note)
    print(f"adapter in {paths.ADAPTER}, answers in {paths.ANSWERS}; make compare shows what changed")


if __name__ == "__main__":
    run(main)
