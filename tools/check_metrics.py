"""Compare the metrics of the last run with those that a commit holds, within stated tolerances.

    python tools/check_metrics.py [--against REV]      (make check-metrics; REV: default HEAD)

For a check of `make repro` on another machine: processors differ in the last digits (trnlora/reporting/tolerances.py).
Exit code 1 where a metric is further off, or where a file here is not what its run wrote. Results that are older than
params, code or data are named.

Reads   metrics/*.json, dvc.lock and the files that it names, here and in REV
"""

from trnlora import paths
from trnlora.cli import script_parser
from trnlora.errors import UserError, run
from trnlora.reporting.results import load_results, notes_of
from trnlora.reporting.tolerances import beyond_tolerance


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--against", default="HEAD", metavar="REV", help="default: %(default)s")
    args = parser.parse_args()
    found, expected = load_results(), load_results(args.against)
    lines = beyond_tolerance(expected, found)
    for line in [*notes_of(found, expected), *lines]:
        print(line)
    if any(file.startswith(f"{paths.METRICS}/") for file in found.changes.modified):
        raise UserError("the metrics here are not those that a run wrote: see above")
    if lines:
        raise UserError(f"{len(lines)} metrics are not those of {args.against}: see above")
    print(f"the metrics are those of {args.against}, within the tolerances for another processor")


if __name__ == "__main__":
    run(main)
