"""Which metrics the report, the summary and the model card show, and how their values are written."""

from collections.abc import Callable
from typing import Any, NamedTuple

from trnlora.reporting.results import Results

NOTHING = "–"  # in place of a metric that a run lacks

FORMS: dict[str, Callable[[Any], str]] = {
    "percent": lambda value: f"{value:.1%}",
    "score": lambda value: f"{value:.3f}",
    "loss": lambda value: f"{value:.4f}",
    "nats": lambda value: f"{value:.6f}",
    "gap": lambda value: f"{value:.1e}",
    "seconds": lambda value: f"{value:.0f} s" if value >= 10 else f"{value:.1f} s",
    "rate": lambda value: f"{value:.0f}",
    "gib": lambda value: f"{value:.2f} GiB",
    "count": lambda value: f"{value:,}",
    "mean": lambda value: f"{value:.1f}",
}


class Score(NamedTuple):
    """A score that eval_vllm writes below `base` and `tuned`."""

    title: str
    key: str
    form: str


class Loss(NamedTuple):
    """A measurement of the loss on the validation rows: keys of the base model's (None: not measured) and the tuned."""

    measured_by: str
    stage: str
    base: str | None
    tuned: str


SCORES = (
    Score("exact match", "exact_match", "percent"),
    Score("ROUGE-1", "rouge1", "score"),
    Score("ROUGE-2", "rouge2", "score"),
    Score("ROUGE-L", "rougeL", "score"),
    Score("BLEU", "bleu", "score"),
    Score("chrF", "chrf", "score"),
    Score("loss, nats per token", "loss", "loss"),
    Score("answers cut off at the token limit", "truncated_fraction", "percent"),
    Score("words per answer", "response_words", "mean"),
    Score("tokens per answer", "response_tokens", "mean"),
)
LOSSES = (
    Loss("trainer (tensor-parallel ranks, packed rows)", "finetune_lora", "base_validation_loss", "validation_loss"),
    Loss("HF + PEFT (one process, row by row)", "flatten_adapter", None, "peft_validation_loss"),
    Loss("vLLM (prompt_logprobs)", "eval_vllm", "base.loss", "tuned.loss"),
)


def categories(now: Results) -> list[str]:
    """The categories of the test rows."""
    return list(now.below("eval_vllm", "tuned.exact_match_by_category"))


def formatted(source: Results, stage: str, key: str, form: str) -> str:
    """A metric in the short form FORMS[form]."""
    value = source.number(stage, key)
    return NOTHING if value is None else FORMS[form](value)


def cell(source: Results | None, stage: str, key: str | None, form: str) -> Any:
    """A metric as HTML (markupsafe.Markup): its short form, with its source and its full value as data attributes."""
    from markupsafe import Markup

    value = source.number(stage, key) if source and key else None
    if value is None or source is None or key is None:
        return Markup('<span class="none">{}</span>').format(NOTHING)
    file = source.find(stage, key)[0]
    return Markup('<span data-rev="{}" data-metric="{}:{}" data-value="{}">{}</span>').format(
        source.name, file, key, repr(value), FORMS[form](value)
    )


def change(now: Results, other: Results, stage: str, key: str, form: str) -> str:
    """now − other with its sign. Percentages differ in percentage points (pt)."""
    before, after = other.number(stage, key), now.number(stage, key)
    if before is None or after is None:
        return NOTHING
    size = abs(after - before)
    text = f"{100 * size:.1f} pt" if form == "percent" else FORMS[form](size)
    return ("−" if after < before else "+" if after > before else "±") + text
