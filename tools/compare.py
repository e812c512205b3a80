"""Print what differs between two runs: params, metrics, and the answers that changed.

    python tools/compare.py [A] [B] [--samples N]        (make compare A=REV B=REV SAMPLES=N)

A, B    a commit, branch, tag or DVC experiment; default: HEAD and the working tree
Reads   dvc.lock and the files that it names, metrics/, artifacts/answers.jsonl of both, from Git and DVC's cache

The params are those of the runs, which dvc.lock recorded. A line `stale: …` names what changed since.

Seconds, memory and speed differ in any two runs and are left out; `make report COMPARE=REV` shows them.
"""

import sys

from rich.console import Console

from trnlora.cli import script_parser, whole_number
from trnlora.errors import run
from trnlora.reporting.comparison import print_comparison
from trnlora.reporting.results import load_results


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("a", metavar="A", nargs="?", help="a commit or experiment (default: HEAD)")
    parser.add_argument("b", metavar="B", nargs="?", help="another one (default: the working tree)")
    parser.add_argument(
        "--samples",
        type=whole_number(0, 10**6),
        default=3,
        metavar="N",
        help="number of answers to show (default: %(default)s)",
    )
    args = parser.parse_args()
    a, b = load_results(args.a or "HEAD"), load_results(args.b or None)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    print_comparison(console, a, b, args.samples)


if __name__ == "__main__":
    run(main)
