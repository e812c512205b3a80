"""Get a run's adapter, answers and metrics from the DVC remote.

    python tools/pull_results.py [REV]      (make pull-results REV=commit)

REV     a commit, branch, tag or DVC experiment (default: HEAD)
Reads   Git, the DVC remote or DVC's cache
Writes  reports/REV
"""

import subprocess
import sys
from pathlib import Path

from trnlora import paths
from trnlora.cli import script_parser
from trnlora.errors import UserError, run

REPORTS = Path("reports")


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("rev", metavar="REV", nargs="?", help="default: HEAD")
    revision = parser.parse_args().rev or "HEAD"
    folder = folder_of(revision)
    for path in (paths.ADAPTER, paths.ANSWERS, paths.METRICS):
        out = folder / path.name
        command = [sys.executable, "-m", "dvc", "get", "--quiet", "--force", f"--rev={revision}", f"--out={out}", "."]
        if subprocess.run([*command, str(path)], check=False).returncode:
            raise UserError(f"cannot get {path} of {revision}: see above")
        print(out)


def folder_of(revision: str) -> Path:
    """reports/REV. Raises UserError for a revision that would lead elsewhere, or into the reports of another tool."""
    parts = revision.split("/")
    if (
        not revision.isprintable()
        or {"", ".", ".."} & set(parts)
        or parts[0] in ("adapter", "report.html", "summary.md")
    ):
        raise UserError(f"REV {revision!r} cannot be the name of a folder in {REPORTS}: name the commit by its hash")
    return REPORTS.joinpath(*parts)


if __name__ == "__main__":
    run(main)
