"""Print the metrics of the last run as tables: base against tuned, then stage by stage.

    python tools/show_metrics.py

Reads   metrics/*.json, metrics/timing/*.json (`dvc metrics show` and `dvc metrics diff` read the same)
"""

import argparse
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from trnlora import paths
from trnlora.errors import UserError, run
from trnlora.files import read_json

STAGES = ("fetch_model", "prepare_data", "convert_nxd", "finetune_lora", "flatten_adapter", "eval_vllm")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found = {stage: stage_metrics(stage) for stage in STAGES}
    if not any(found.values()):
        raise UserError("there are no metrics yet: run `make repro`")
    console = Console()

    table = Table("stage", "metric", "value", title="Metrics", title_justify="left")
    for stage, metrics in found.items():
        for number, (key, value) in enumerate(flat(without_models(metrics))):
            table.add_row(stage if number == 0 else "", key, shown(value))
        table.add_section()
    console.print(table)

    evaluation = found["eval_vllm"]
    if "base" in evaluation:
        base, tuned = dict(flat(evaluation["base"])), dict(flat(evaluation["tuned"]))
        scores = Table("test rows", "base", "tuned", title="Base model against adapter", title_justify="left")
        for key in base:
            scores.add_row(key, shown(base[key]), shown(tuned[key]))
        console.print(scores)
    print(f"adapter in {paths.ADAPTER}, answers in {paths.ANSWERS}; next: make serve, dvc metrics diff, dvc plots show")


def stage_metrics(stage: str) -> dict[str, Any]:
    """What a stage measured, its timing included; empty where it has not run."""
    files = (paths.METRICS / f"{stage}.json", paths.METRICS / "timing" / f"{stage}.json")
    return {key: value for file in files if file.exists() for key, value in read_json(file).items()}


def without_models(metrics: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metrics.items() if key not in ("base", "tuned")}


def flat(metrics: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in metrics.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run(main)
