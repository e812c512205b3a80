"""The run as Markdown, for a pull request."""

import re
from collections.abc import Sequence
from typing import Any

from trnlora.reporting.answers import OUTCOMES, AnswerRow
from trnlora.reporting.results import Results, notes_of, params_that_differ
from trnlora.reporting.values import FORMS, LOSSES, SCORES, Score, categories, change, formatted

MAX_SAMPLES = 3


def summary(
    now: Results, others: Sequence[Results], run: dict[str, str], here: dict[str, str], rows: list[AnswerRow]
) -> str:
    """What is stale, scores, losses, speed, some answers and what was run; with `others`, also what differs.

    run, here: `what_was_run` and `where_shown`.
    """
    notes = [line for note in notes_of(now, *others) for line in (f"> {note}", ">")]
    lines = [f"### {run['Profile']}", "", *notes, "", *score_table(now, others), "", *_measured(now)]
    lines += _harness(now)
    lines += _differing_params(now, others)
    samples = [row for row in rows if (row.others if others else row.outcome == OUTCOMES[False, True])]
    for row in samples[:MAX_SAMPLES]:
        lines += _sample(row)
    lines += ["", *(f"- {label}: {text}" for label, text in run.items() if label != "Profile")]
    lines.append(f"- Report: {', '.join(here.values())}")
    return "\n".join(lines) + "\n"


def score_table(now: Results, others: Sequence[Results] = ()) -> list[str]:
    """Base against tuned as lines of a Markdown table; also the others' tuned scores, and the change since if one."""
    head = ["", "base", "tuned", *(f"tuned, {other.name}" for other in others)]
    head += ["change"] if len(others) == 1 else []
    lines = [f"| {' | '.join(map(table_cell, head))} |", "|---|" + "---:|" * (len(head) - 1)]
    of_categories = [Score(f"· {name}", f"exact_match_by_category.{name}", "percent") for name in categories(now)]
    for title, key, form in [SCORES[0], *of_categories, *SCORES[1:]]:
        cells = [title, *(formatted(now, "eval_vllm", f"{model}.{key}", form) for model in ("base", "tuned"))]
        tuned = f"tuned.{key}"
        cells += [formatted(other, "eval_vllm", tuned, form) for other in others]
        if len(others) == 1:
            cells.append(change(now, others[0], "eval_vllm", tuned, form))
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


def _harness(now: Results) -> list[str]:
    """A table of what lm-evaluation-harness measured; nothing if it did not run."""
    if now.harness is None:
        return []
    rows = [
        f"| {table_cell(score.task)} {table_cell(score.metric)} | {FORMS['score'](score.base)} | "
        f"{FORMS['score'](score.tuned)} | {score.samples} |"
        for score in now.harness.scores()
    ]
    head = f"| lm-evaluation-harness {table_cell(now.harness.harness)} | base | tuned | samples |"
    return ["", head, "|---|---:|---:|---:|", *rows]


def _differing_params(now: Results, others: Sequence[Results]) -> list[str]:
    """A table of the params that differ; nothing if they are the same."""
    runs = [now, *others]
    rows = [
        f"| {key} | {' | '.join('–' if value is None else table_cell(value) for value in values)} |"
        for key, values in params_that_differ(*runs)
    ]
    names = " | ".join(table_cell(run.name) for run in runs)
    return ["", f"| param | {names} |", "|---|" + "---|" * len(runs), *rows] if rows else []


def _sample(row: AnswerRow) -> list[str]:
    """A test row that folds out."""
    from markupsafe import escape

    answer = row.answer
    texts = [("reference", answer["reference"]), ("base", answer["base"])]
    texts += [(name, text) for name, text, _ in row.others]
    texts.append(("tuned", answer["tuned"]))
    return [
        "",
        f"<details><summary>row {answer['id']} · {escape(answer['category'])} · {row.outcome}</summary>",
        "",
        *(f"**{name}**\n{fenced(text)}" for name, text in texts),
        "",
        "</details>",
    ]
