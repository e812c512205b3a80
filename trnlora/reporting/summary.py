"""The run as Markdown, for a pull request."""

import re
from typing import Any

from trnlora.reporting.answers import OUTCOMES, AnswerRow
from trnlora.reporting.results import Results, differing, notes_of
from trnlora.reporting.values import FORMS, LOSSES, SCORES, Score, categories, change, formatted

MAX_SAMPLES = 3


def summary(
    now: Results, other: Results | None, run: dict[str, str], here: dict[str, str], rows: list[AnswerRow]
) -> str:
    """What is stale, scores, losses, speed, some answers and what was run; with `other`, also what changed since.

    run, here: `what_was_run` and `where_shown`.
    """
    notes = [line for note in notes_of(now, other) for line in (f"> {note}", ">")]
    lines = [f"### {run['Profile']}", "", *notes, "", *score_table(now, other), "", *_measured(now)]
    if other:
        lines += _changed_params(now, other)
        samples = [row for row in rows if row.other_answer is not None]
    else:
        samples = [row for row in rows if row.outcome == OUTCOMES[False, True]]
    for row in samples[:MAX_SAMPLES]:
        lines += _sample(row, other.name if other else "")
    lines += ["", *(f"- {label}: {text}" for label, text in run.items() if label != "Profile")]
    lines.append(f"- Report: {', '.join(here.values())}")
    return "\n".join(lines) + "\n"


def score_table(now: Results, other: Results | None = None) -> list[str]:
    """Base against tuned as lines of a Markdown table; with `other`, also its tuned scores and the change since."""
    head = ["", "base", "tuned", *([f"tuned, {other.name}", "change"] if other else [])]
    lines = [" | ".join(["", *head, ""]).strip(), "|---|" + "---:|" * (len(head) - 1)]
    of_categories = [Score(f"· {name}", f"exact_match_by_category.{name}", "percent") for name in categories(now)]
    for title, key, form in [SCORES[0], *of_categories, *SCORES[1:]]:
        cells = [title, *(formatted(now, "eval_vllm", f"{model}.{key}", form) for model in ("base", "tuned"))]
        if other:
            tuned = f"tuned.{key}"
            cells += [formatted(other, "eval_vllm", tuned, form), change(now, other, "eval_vllm", tuned, form)]
        lines.append(f"| {' | '.join(map(table_cell, cells))} |")
    return lines


def table_cell(value: Any) -> str:
    """A value in a cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def fenced(text: str) -> str:
    """A Markdown code block whose fence is longer than any run of backticks in the text."""
    fence = "`" * max(3, 1 + max((len(ticks) for ticks in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _measured(now: Results) -> list[str]:
    """Sentences about answers, losses and speed."""
    changed = formatted(now, "eval_vllm", "changed_fraction", "percent")
    lines = [f"Answers changed by the adapter: {changed} of {formatted(now, 'eval_vllm', 'prompts', 'count')}."]
    losses = [
        f"{formatted(now, loss.stage, loss.tuned, 'nats')} ({loss.measured_by.split(' (')[0]})"
        for loss in LOSSES
        if now.number(loss.stage, loss.tuned) is not None
    ]
    if losses:
        lines.append(f"Validation loss with the adapter: {', '.join(losses)}.")
    speed = now.number("finetune_lora", "tokens_per_second")
    if speed is not None:
        seconds = formatted(now, "finetune_lora", "seconds", "seconds")
        lines.append(f"Training: {FORMS['rate'](speed)} tokens/s, {seconds}.")
    return lines


def _changed_params(now: Results, other: Results) -> list[str]:
    """A table of the params that differ; nothing if they are the same."""
    rows = [
        f"| {key} | {table_cell(before)} | {table_cell(after)} |"
        for key, before, after in differing(other.params, now.params)
    ]
    return ["", f"| param | {table_cell(other.name)} | {now.name} |", "|---|---|---|", *rows] if rows else []


def _sample(row: AnswerRow, other_name: str) -> list[str]:
    """A test row that folds out."""
    from markupsafe import escape

    answer = row.answer
    texts = [("reference", answer["reference"]), ("base", answer["base"])]
    if row.other_answer is not None:
        texts.append((other_name, row.other_answer))
    texts.append(("tuned", answer["tuned"]))
    return [
        "",
        f"<details><summary>row {answer['id']} · {escape(answer['category'])} · {row.outcome}</summary>",
        "",
        *(f"**{name}**\n{fenced(text)}" for name, text in texts),
        "",
        "</details>",
    ]
