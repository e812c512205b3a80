"""The metrics of one run as tables in the terminal."""

from typing import Any

from rich.table import Column, Table
from rich.text import Text

from trnlora.metrics import stages
from trnlora.reporting.results import Results
from trnlora.reporting.values import NOTHING

MODELS = ("base", "tuned")
LEFT_OUT = (*MODELS, "sha256")  # base and tuned have a table of their own


def metrics_table(now: Results) -> Table:
    """Every stage's metrics, except for the scores of the two models and digests."""
    table = Table("stage", Column("metric", no_wrap=True), Column("value", overflow="fold"), title="Metrics")
    for stage in stages():
        rest = {key: value for key, value in now.of_stage(stage).items() if key.split(".")[0] not in LEFT_OUT}
        for number, (key, value) in enumerate(rest.items()):
            table.add_row("" if number else stage, Text(key), Text(shown(value)))
        table.add_section()
    return table


def scores_table(now: Results) -> Table | None:
    """Base model against adapter; None if they have not been evaluated."""
    base, tuned = (now.below("eval_vllm", model) for model in MODELS)
    if not base:
        return None
    table = Table("test rows", *MODELS, title="Base model and adapter")
    for key, value in base.items():
        table.add_row(*(Text(cell) for cell in (key, shown(value), shown(tuned.get(key)))))
    return table


def shown(value: Any) -> str:
    """A value with four significant digits; a dash for None."""
    return NOTHING if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
