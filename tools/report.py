"""Write the run as one HTML page that needs no network, and as a summary for a pull request.

    python tools/report.py [--compare REV …] [--out DIR]        (make report COMPARE="REV …")

REV is a commit, branch, tag or DVC experiment. The report then shows its values next to those of the working tree. It
may be given several times.

The params are those of the run, which dvc.lock recorded. At the top of both are lines that name what changed since.

Reads   dvc.lock and the files that it names, metrics/, profiles/, plots/training, artifacts/answers.jsonl; those of
        each REV from Git and DVC's cache
Writes  reports/report.html, reports/summary.md
"""

from pathlib import Path

from trnlora.cli import script_parser
from trnlora.errors import run
from trnlora.reporting.page import write_report
from trnlora.reporting.results import load_results, notes_of


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="REV",
        help="a commit or experiment to compare with; repeatable",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("reports"), metavar="DIR", help="output folder (default: %(default)s)"
    )
    args = parser.parse_args()
    now = load_results()
    others = [load_results(revision) for revision in dict.fromkeys(filter(None, args.compare))]
    page, summary = write_report(args.out, now, others)
    for note in notes_of(now, *others):
        print(note)
    print(f"report in {page}, summary for a pull request in {summary}")


if __name__ == "__main__":
    run(main)
