"""Print the metrics of the last run as tables: base against tuned, then stage by stage.

    python tools/show_metrics.py

Reads   metrics/*.json, metrics/timing/*.json (`dvc metrics show` and `dvc metrics diff` read the same)
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from trnlora import paths
from trnlora.errors import UserError, run
from trnlora.files import read_json
from trnlora.reporting.results import STAGES, flat, metric_files

MODELS = ("base", "tuned")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found = {stage: stage_metrics(stage) for stage in STAGES}
    if not any(found.values()):
        raise UserError("there are no metrics yet: run `make repro`")
    console = Console(width=None if sys.stdout.isatty() else 120)

    table = Table("stage", Column("metric", no_wrap=True), Column("value", overflow="fold"), title="Metrics")
    for stage, metrics in found.items():
        rest = {key: value for key, value in metrics.items() if not key.startswith(MODELS) and key != "sha256"}
        for number, (key, value) in enumerate(rest.items()):
            table.add_row(stage if number == 0 else "", key, shown(value))
        table.add_section()
    console.print(table)

    base, tuned = (dict(of_model(found["eval_vllm"], name)) for name in MODELS)
    if base:
        scores = Table("test rows", *MODELS, title="Base model and adapter")
        for key, value in base.items():
            scores.add_row(key, shown(value), shown(tuned[key]))
        console.print(scores)
    print(f"adapter in {paths.ADAPTER}, answers in {paths.ANSWERS}; next: make serve, dvc metrics diff, dvc plots show")


def stage_metrics(stage: str) -> dict[str, Any]:
    """What a stage measured, its timing included, keys joined with dots; empty where it has not run."""
    files = (Path(file) for file in metric_files(stage))
    return {key: value for file in files if file.exists() for key, value in flat(read_json(file))}


def of_model(evaluation: dict[str, Any], name: str) -> Iterator[tuple[str, Any]]:
    """eval_vllm's values of one model: name.… and name_exact_match_by_category.…"""
    for key, value in evaluation.items():
        if key.startswith((f"{name}.", f"{name}_")):
            yield key[len(name) + 1 :], value


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run(main)
