"""The results of one run, from the working tree or from any commit: metrics, params, training curves, answers.

Nothing is computed here: the values are those of `dvc metrics show`.
"""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trnlora import paths
from trnlora.data.examples import Answer
from trnlora.errors import UserError
from trnlora.metrics import metrics_file, stages, timing_file

CURVES = ("train/loss", "validation/loss", "train/lr", "train/grad_norm", "train/tokens_per_second")
WORKSPACE = "workspace"


@dataclass(frozen=True)
class Results:
    """One run. What it lacks (a stage that has not run, answers that are not in DVC's cache) is empty or None."""

    name: str  # WORKSPACE, or the revision as the user wrote it
    metrics: dict[str, dict[str, Any]]  # by file; keys of nested values are joined with dots, as DVC does
    params: dict[str, Any]  # keys joined with dots as well
    curves: dict[str, list[tuple[int, float]]]  # (optimizer step, value)
    answers: list[Answer] | None

    def find(self, stage: str, key: str) -> tuple[str, Any]:
        """The file and the value of a stage's metric. The value is None if there is none."""
        files = _files(stage)
        for file in files:
            if key in self.metrics.get(file, {}):
                return file, self.metrics[file][key]
        return files[0], None

    def get(self, stage: str, key: str) -> Any:
        """The value of a stage's metric, or None."""
        return self.find(stage, key)[1]

    def of_stage(self, stage: str) -> dict[str, Any]:
        """All metrics of a stage, timing included. Empty if the stage has not run."""
        return {key: value for file in _files(stage) for key, value in self.metrics.get(file, {}).items()}

    def below(self, stage: str, key: str) -> dict[str, Any]:
        """The values nested below a key, e.g. {category: rows} of rows_by_category."""
        prefix = f"{key}."
        return {
            name.removeprefix(prefix): value for name, value in self.of_stage(stage).items() if name.startswith(prefix)
        }


def load_results(revision: str | None = None) -> Results:
    """The results of a revision (commit, branch, tag or name of a DVC experiment). None: of the working tree.

    Raises UserError if Git and DVC do not know the revision, or if there are no metrics at all.
    """
    read = _reader(revision)
    files = [file for stage in stages() for file in _files(stage)]
    metrics = {file: dict(flat(json.loads(text))) for file in files if (text := read(file))}
    name = revision or WORKSPACE
    if not metrics:
        raise UserError("there are no metrics yet: run `make repro`" if revision is None else f"{name} has no metrics")
    answers = read(str(paths.ANSWERS))
    return Results(
        name=name,
        metrics=metrics,
        params=dict(flat(yaml.safe_load(read(str(paths.PARAMS)) or "{}"))),
        curves={curve: _curve(read(f"{paths.PLOTS}/training/plots/metrics/{curve}.tsv")) for curve in CURVES},
        answers=[json.loads(line) for line in answers.split("\n") if line] if answers else None,
    )


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of a nested dict, its keys joined with dots."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def differing(a: dict[str, Any], b: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, value in a, value in b) where two flat dicts differ. The value of a missing key is None."""
    for key in dict.fromkeys([*a, *b]):
        if a.get(key) != b.get(key):
            yield key, a.get(key), b.get(key)


def _files(stage: str) -> tuple[str, str]:
    return str(metrics_file(stage)), str(timing_file(stage))


def _reader(revision: str | None) -> Callable[[str], str | None]:
    """Return a function that reads a file of the project at this revision. It returns None if the file is missing."""
    if revision is None:
        return lambda path: Path(path).read_text("utf-8") if Path(path).is_file() else None

    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException

    try:
        files = DVCFileSystem(rev=revision)
        _ = files.repo  # looks the revision up
    except DvcException as error:
        raise UserError(f"{' '.join(str(error).split())}: name a commit, branch, tag or experiment") from None

    def read(path: str) -> str | None:
        try:
            return str(files.read_text(path, encoding="utf-8"))
        except (OSError, DvcException):  # also when DVC knows the file but its cache does not hold it
            return None

    return read


def _curve(tsv: str | None) -> list[tuple[int, float]]:
    return [(int(step), float(value)) for step, value in list(csv.reader((tsv or "").splitlines(), delimiter="\t"))[1:]]
