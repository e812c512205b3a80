"""The metrics files of the stages, which DVC compares between commits.

metrics/<stage>.json holds what is the same in two runs of one commit; metrics/timing/<stage>.json holds seconds, memory
and speed, on which no stage depends.
"""

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trnlora import paths
from trnlora.files import atomic_outputs, partial_path, write_json
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


def stage_outputs(
    stage: str, folders: Sequence[Path], files: Sequence[Path] = (), reads: Sequence[Path] = ()
) -> contextlib.AbstractContextManager[None]:
    """`atomic_outputs` of a stage: these folders and files and its metrics, which get their names last.

    Enter it before reading anything, so that a second run is refused at once and changes nothing.
    """
    return atomic_outputs(folders, [*files, metrics_file(stage), timing_file(stage)], reads)


def write_metrics(stage: str, metrics: dict[str, Any], timing: dict[str, Any]) -> None:
    """Write both files of a stage under their partial names, within its `stage_outputs`."""
    write_json(partial_path(metrics_file(stage)), metrics)
    write_json(partial_path(timing_file(stage)), timing)
