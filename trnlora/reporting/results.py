"""What a run left behind, in the working tree or in any commit: metrics, params, training curves, answers.

The tools that show and compare runs read from here. Nothing is computed: values are those of `dvc metrics show`.
"""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trnlora import paths
from trnlora.errors import UserError

STAGES = ("fetch_model", "prepare_data", "convert_nxd", "finetune_lora", "flatten_adapter", "eval_vllm")
CURVES = ("train/loss", "validation/loss", "train/lr", "train/grad_norm", "train/tokens_per_second")
WORKSPACE = "workspace"


@dataclass(frozen=True)
class Results:
    """One run. What it lacks (a stage that has not run, answers that are not in DVC's cache) is empty or None."""

    name: str  # WORKSPACE, or the revision as the user wrote it
    metrics: dict[str, dict[str, Any]]  # by file; keys of nested values are joined with dots, as DVC does
    params: dict[str, Any]  # likewise
    curves: dict[str, list[tuple[int, float]]]  # (optimizer step, value)
    answers: list[dict[str, Any]] | None

    def find(self, stage: str, key: str) -> tuple[str, Any]:
        """The file and the value of a stage's metric; the value is None where there is none."""
        for file in metric_files(stage):
            if key in self.metrics.get(file, {}):
                return file, self.metrics[file][key]
        return metric_files(stage)[0], None

    def get(self, stage: str, key: str) -> Any:
        return self.find(stage, key)[1]


def load_results(revision: str | None = None) -> Results:
    """The results of a revision (commit, branch, tag or name of a DVC experiment); None: of the working tree.

    Raises UserError for a revision that Git and DVC do not know, and where there are no metrics at all.
    """
    read = _reader(revision)
    metrics = {
        file: dict(flat(json.loads(text))) for stage in STAGES for file in metric_files(stage) if (text := read(file))
    }
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


def metric_files(stage: str) -> tuple[str, str]:
    return f"{paths.METRICS}/{stage}.json", f"{paths.METRICS}/timing/{stage}.json"


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def differing(a: dict[str, Any], b: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, value in a, value in b) of two flat dicts where the values differ; None where a key is missing."""
    for key in dict.fromkeys([*a, *b]):
        if a.get(key) != b.get(key):
            yield key, a.get(key), b.get(key)


def _reader(revision: str | None) -> Callable[[str], str | None]:
    """A function from a path in the project to its text, or to None where there is no such file."""
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
        except (OSError, DvcException):  # DVC knows the file and its cache does not hold it
            return None

    return read


def _curve(tsv: str | None) -> list[tuple[int, float]]:
    return [(int(step), float(value)) for step, value in list(csv.reader((tsv or "").splitlines(), delimiter="\t"))[1:]]
