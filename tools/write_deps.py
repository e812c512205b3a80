"""Write the code that each stage depends on into dvc.yaml, from what its script imports.

    python tools/write_deps.py      (make deps)

Run it after a change of imports. Other dependencies (artifacts, data, metrics) and comments in dvc.yaml stay.
"""

from pathlib import Path

from trnlora.cli import script_parser
from trnlora.dependencies import stage_code
from trnlora.errors import run
from trnlora.files import atomic_file

PIPELINE = Path("dvc.yaml")


def main() -> None:
    script_parser(__doc__).parse_args()
    text = PIPELINE.read_text("utf-8")
    written = with_code_deps(text, Path())
    if written == text:
        print(f"{PIPELINE} is up to date")
        return
    with atomic_file(PIPELINE) as partial:
        partial.write_text(written, "utf-8")
    print(f"{PIPELINE} is written: 'git diff {PIPELINE}' shows the change")


def with_code_deps(text: str, root: Path) -> str:
    """The text of dvc.yaml with each stage's *.py entries below `deps:` replaced; all else stays to the byte."""
    lines: list[str] = []
    stage = ""
    for line in text.splitlines(keepends=True):
        if line.startswith("  ") and line[2] != " " and line.rstrip().endswith(":"):
            stage = line.strip(" :\n")
        if line.startswith("      - ") and line.rstrip().endswith(".py"):
            continue
        lines.append(line)
        if line == "    deps:\n":
            lines += [f"      - {file}\n" for file in stage_code(stage, root)]
    return "".join(lines)


if __name__ == "__main__":
    run(main)
