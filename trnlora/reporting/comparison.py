"""Two runs side by side in the terminal: params, metrics, and the answers that changed."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from trnlora.data.examples import Answer
from trnlora.metrics import metrics_file, stages
from trnlora.reporting.results import Results, differing, notes_of
from trnlora.reporting.values import NOTHING

RIGHT = {False: "wrong", True: "right"}


def print_comparison(console: Console, a: Results, b: Results, samples: int) -> None:
    """Print what differs, and up to `samples` of the answers that changed.

    Seconds, memory and speed, which differ in any two runs, are left out.
    """
    for note in notes_of(a, b):
        console.print(note, markup=False, soft_wrap=True)
    _print_table(console, differences("Params", a, b, [("", a.params, b.params)]), "Params")
    files = [(stage, str(metrics_file(stage))) for stage in stages()]
    metrics = [(stage, a.metrics.get(file, {}), b.metrics.get(file, {})) for stage, file in files]
    _print_table(console, differences("Metrics", a, b, metrics), "Metrics")
    for results in (a, b):
        if results.answers is None:
            console.print(f"Answers: those of {results.name} are not in DVC's cache here", markup=False)
            return
    print_answers(console, a, b, samples)


def _print_table(console: Console, table: Table, title: str) -> None:
    console.print(table if table.row_count else f"{title}: no difference")


def differences(title: str, a: Results, b: Results, groups: list[tuple[str, dict[str, Any], dict[str, Any]]]) -> Table:
    """A table of the values that differ; `groups`: (name, values in a, values in b)."""
    table = Table("", *(Column(Text(name), justify="right") for name in (a.name, b.name, "change")), title=title)
    for group, of_a, of_b in groups:
        for key, before, after in differing(of_a, of_b):
            # As Text: names and values come from params.yaml and may look like rich's markup.
            cells = (f"{group} {key}".strip(), shown(before), shown(after), change(before, after))
            table.add_row(*(Text(cell) for cell in cells))
        table.add_section()
    return table


def print_answers(console: Console, a: Results, b: Results, samples: int) -> None:
    """How many of the tuned model's answers to the same test rows changed, and some of them."""
    changed, total = changed_answers(a, b)
    flips = [(old["tuned_exact"], new["tuned_exact"]) for old, new in changed]
    console.print(
        f"Answers: {len(changed)} of {total} changed, {flips.count((False, True))} from wrong to right, "
        f"{flips.count((True, False))} from right to wrong"
    )
    for old, new in changed[:samples]:
        table = Table(
            "",
            Column(overflow="fold"),
            show_header=False,
            title_justify="left",
            title=Text(
                f"row {new['id']}, {new['category']}: {RIGHT[old['tuned_exact']]} → {RIGHT[new['tuned_exact']]}"
            ),
        )
        for name, text in _texts(a.name, old, b.name, new):
            table.add_row(Text(name), Text(text.strip()))
        console.print(table)


def changed_answers(a: Results, b: Results) -> tuple[list[tuple[Answer, Answer]], int]:
    """The pairs of tuned answers that differ, those that became right or wrong first; the number of rows of both."""
    before = {answer["id"]: answer for answer in a.answers or []}
    pairs = [(before[answer["id"]], answer) for answer in b.answers or [] if answer["id"] in before]
    changed = [(old, new) for old, new in pairs if old["tuned"].strip() != new["tuned"].strip()]
    changed.sort(key=lambda pair: pair[0]["tuned_exact"] == pair[1]["tuned_exact"])
    return changed, len(pairs)


def _texts(name_a: str, old: Answer, name_b: str, new: Answer) -> Iterator[tuple[str, str]]:
    yield "prompt", new["prompt"]
    yield "reference", new["reference"]
    yield name_a, old["tuned"]
    yield name_b, new["tuned"]


def shown(value: Any) -> str:
    """A value with five significant digits; a dash for None."""
    return NOTHING if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def change(before: Any, after: Any) -> str:
    """after − before of two numbers, with its sign; empty for other values."""
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in (before, after)):
        return ""
    return f"{after - before:+.3g}" if isinstance(after - before, float) else f"{after - before:+}"
