"""The metrics files of the stages, which DVC compares between commits.

metrics/<stage>.json holds what is the same in two runs of one commit; metrics/timing/<stage>.json holds seconds, memory
and speed, on which no stage depends.
"""

import functools
from pathlib import Path
from typing import Any

from trnlora import paths
from trnlora.files import write_json
from trnlora.readers import read_yaml


@functools.cache
def stages() -> tuple[str, ...]:
    """The names of the stages that write metrics, in the order of dvc.yaml: all but check_params."""
    pipeline = read_yaml(Path(__file__).parents[1] / "dvc.yaml")["stages"]
    return tuple(name for name, stage in pipeline.items() if "metrics" in stage)


def metrics_file(stage: str) -> Path:
    """Where a stage writes what is the same in two runs."""
    return paths.METRICS / f"{stage}.json"


def timing_file(stage: str) -> Path:
    """Where a stage writes seconds, memory and speed."""
    return paths.METRICS / "timing" / f"{stage}.json"


def write_metrics(stage: str, metrics: dict[str, Any], timing: dict[str, Any]) -> None:
    """Write both files of a stage."""
    write_json(metrics_file(stage), metrics)
    write_json(timing_file(stage), timing)
