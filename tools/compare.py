"""What differs between two runs: params, metrics, and the answers that changed.

    python tools/compare.py [A] [B] [--samples N]        (make compare A=REV B=REV SAMPLES=N)

A, B    a commit, branch, tag or DVC experiment; default: HEAD and the working tree
Reads   params.yaml, metrics/, artifacts/answers.jsonl of both, from Git and DVC's cache

Seconds, memory and speed differ in any two runs and are left out: `make report COMPARE=REV` shows them.
"""

import argparse
import sys
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from trnlora import paths
from trnlora.errors import run
from trnlora.reporting.results import Results, differing, load_results

RIGHT = {False: "wrong", True: "right"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", metavar="A", nargs="?", default="HEAD", help="a commit or experiment; default: HEAD")
    parser.add_argument("b", metavar="B", nargs="?", help="another one; default: the working tree")
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="answers to show; default: %(default)s")
    args = parser.parse_args()

    a, b = load_results(args.a), load_results(args.b)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    print_differences(console, "Params", a, b, [("", a.params, b.params)])
    files = dict.fromkeys([*a.metrics, *b.metrics])
    metrics = [(file, a.metrics.get(file, {}), b.metrics.get(file, {})) for file in files if "/timing/" not in file]
    print_differences(console, "Metrics", a, b, metrics)
    print_answers(console, a, b, args.samples)


def print_differences(
    console: Console, title: str, a: Results, b: Results, groups: list[tuple[str, dict[str, Any], dict[str, Any]]]
) -> None:
    """One table; `groups`: (file, values in a, values in b)."""
    table = Table("", *(Column(name, justify="right") for name in (a.name, b.name, "change")), title=title)
    for file, of_a, of_b in groups:
        stage = file.removeprefix(f"{paths.METRICS}/").removesuffix(".json")
        for key, before, after in differing(of_a, of_b):
            # Names and values are whatever params.yaml says: not rich's markup.
            cells = (f"{stage} {key}".strip(), shown(before), shown(after), change(before, after))
            table.add_row(*(Text(cell) for cell in cells))
        table.add_section()
    if table.row_count:
        console.print(table)
    else:
        console.print(f"{title}: no difference")


def print_answers(console: Console, a: Results, b: Results, samples: int) -> None:
    """How many of the tuned model's answers to the same test rows changed, and some of them."""
    for results in (a, b):
        if results.answers is None:
            console.print(f"Answers: those of {results.name} are not in DVC's cache here", markup=False)
            return
    before = {row["id"]: row for row in a.answers or []}
    pairs = [(before[row["id"]], row) for row in b.answers or [] if row["id"] in before]
    changed = [(old, new) for old, new in pairs if old["tuned"].strip() != new["tuned"].strip()]
    flips = [(old["tuned_exact"], new["tuned_exact"]) for old, new in changed]
    console.print(
        f"Answers: {len(changed)} of {len(pairs)} changed, {flips.count((False, True))} from wrong to right, "
        f"{flips.count((True, False))} from right to wrong"
    )
    changed.sort(key=lambda pair: pair[0]["tuned_exact"] == pair[1]["tuned_exact"])  # what was won or lost, first
    for old, new in changed[:samples]:
        table = Table(
            "", Column(overflow="fold"), show_header=False, title_justify="left",
            title=f"row {new['id']}, {new['category']}: {RIGHT[old['tuned_exact']]} → {RIGHT[new['tuned_exact']]}",
        )  # fmt: skip
        texts = (
            ("prompt", new["prompt"]),
            ("reference", new["reference"]),
            (a.name, old["tuned"]),
            (b.name, new["tuned"]),
        )
        for name, text in texts:
            table.add_row(Text(name), Text(text.strip()))
        console.print(table)


def shown(value: Any) -> str:
    return "–" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def change(before: Any, after: Any) -> str:
    """after − before of two numbers, signed; nothing for other values."""
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in (before, after)):
        return ""
    return f"{after - before:+.3g}" if isinstance(after - before, float) else f"{after - before:+}"


if __name__ == "__main__":
    run(main)
