"""The results of one run, from the working tree or from any commit: metrics, params, training curves, answers.

Nothing is computed here: the values are those of `dvc metrics show`. The params are those of the run, as
dvc.lock recorded them, not those that params.yaml has now.
"""

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from trnlora import paths
from trnlora.data.examples import Answer
from trnlora.errors import UserError
from trnlora.evaluation.harness import RESULTS as HARNESS
from trnlora.evaluation.harness import HarnessResults
from trnlora.metrics import metrics_file, stages, timing_file
from trnlora.readers import check_writable, checked, parse_json, parse_jsonl_as, parse_yaml
from trnlora.recorded import (
    FIX,
    LOCK,
    Changes,
    StageRun,
    changes,
    one_line,
    param_values,
    parse_lock,
    recorded_params,
    workspace_changes,
)

CURVES = ("train/loss", "validation/loss", "train/lr", "train/grad_norm", "train/tokens_per_second")
WORKSPACE = "workspace"
RERUN = ": `make repro` writes it again"
RERUN_HARNESS = ": `make lm-eval` writes it again"


@dataclass(frozen=True)
class Results:
    """One run. What it lacks (a stage that has not run, answers that are not in DVC's cache) is empty or None."""

    name: str  # WORKSPACE, or the revision as the user wrote it
    metrics: dict[str, dict[str, Any]]  # by file; keys of nested values are joined with dots, as DVC does
    params: dict[str, Any]  # that the stages read when they ran, by `section.key`
    adapter: str | None  # md5 of artifacts/adapter, as dvc.lock recorded it
    curves: dict[str, list[tuple[int, float]]]  # (optimizer step, value)
    answers: list[Answer] | None
    harness: HarnessResults | None
    changes: Changes  # since the run: in the working tree, or in the revision's own files

    @property
    def notes(self) -> list[str]:
        """A line for each way in which these are not the results of the project's present params, code and data."""
        lines = self.changes.lines("" if self.name == WORKSPACE else self.name)
        if self.harness and self.adapter and self.harness.adapter != self.adapter:
            lines.append(f"stale: {self.where(str(HARNESS))} is of another adapter; `make lm-eval` writes it again")
        return lines

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

    def number(self, stage: str, key: str) -> float | None:
        """The value of a stage's metric, or None. Raises UserError if it is not a finite number."""
        file, value = self.find(stage, key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
            raise UserError(f"{self.where(file)}: {key} is {str(value)[:100]!r}, which is not a finite number{RERUN}")
        return value

    def where(self, file: str) -> str:
        """What errors call a file of this run."""
        return file if self.name == WORKSPACE else f"{file} of {self.name}"

    def of_stage(self, stage: str) -> dict[str, Any]:
        """All metrics of a stage, timing included. Empty if the stage has not run."""
        return {key: value for file in _files(stage) for key, value in self.metrics.get(file, {}).items()}

    def below(self, stage: str, key: str) -> dict[str, Any]:
        """The values nested below a key, e.g. {category: rows} of rows_by_category."""
        prefix = f"{key}."
        return {
            name.removeprefix(prefix): value for name, value in self.of_stage(stage).items() if name.startswith(prefix)
        }


def notes_of(*runs: Results) -> list[str]:
    """The notes of all these runs, each once."""
    return list(dict.fromkeys(note for run in runs for note in run.notes))


def load_results(revision: str | None = None) -> Results:
    """The results of a revision (commit, branch, tag or name of a DVC experiment). None: of the working tree.

    Raises UserError if Git and DVC do not know the revision, if there are no metrics at all, or if a file of the run
    holds something else than a run writes.
    """
    read, name = (_read_here, WORKSPACE) if revision is None else (_reader(repo := _open(revision), revision), revision)

    def where(path: str) -> str:
        return path if revision is None else f"{path} of {revision}"

    files = [file for stage in stages() for file in _files(stage)]
    metrics = {file: _metrics(text, where(file)) for file in files if (text := read(file)) is not None}
    if not metrics:
        raise UserError("there are no metrics yet: run `make repro`" if revision is None else f"{name} has no metrics")
    if harness := read(str(HARNESS)):
        metrics[str(HARNESS)] = _metrics(harness, where(str(HARNESS)))
    lock, answers, curves = read(LOCK), read(str(paths.ANSWERS)), {}
    for curve in CURVES:
        file = f"{paths.PLOTS}/training/plots/metrics/{curve}.tsv"
        curves[curve] = _curve(read(file) or "", where(file))
    runs = parse_lock(lock, where(LOCK)) if lock else {}
    return Results(
        name=name,
        metrics=metrics,
        params=recorded_params(runs, stages())
        if runs
        else _values(read(str(paths.PARAMS)) or "", where("params.yaml")),
        curves=curves,
        adapter=runs["flatten_adapter"].outs.get(str(paths.ADAPTER)) if "flatten_adapter" in runs else None,
        harness=_harness(harness, where(str(HARNESS))) if harness else None,
        answers=parse_jsonl_as(answers, where(str(paths.ANSWERS)), Answer, RERUN) if answers else None,
        changes=workspace_changes() if revision is None else _changes_of(repo, lock, runs),
    )


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of a nested dict, its keys joined with dots."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """The nested dict of which these are the values by dotted key. Every key has one dot at most, as params have."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (found.setdefault(section, {}) if section else found)[name] = value
    return found


def differing(a: dict[str, Any], b: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, value in a, value in b) where two flat dicts differ. The value of a missing key is None."""
    for key in dict.fromkeys([*a, *b]):
        if a.get(key) != b.get(key):
            yield key, a.get(key), b.get(key)


def params_that_differ(*runs: Results) -> list[tuple[str, list[Any]]]:
    """(param, its value in each run; None where a run has no such param) of those that are not the same in all."""
    keys = sorted({key for run in runs for key in run.params})
    values = [(key, [run.params.get(key) for run in runs]) for key in keys]
    return [(key, of_runs) for key, of_runs in values if any(value != of_runs[0] for value in of_runs)]


def _files(stage: str) -> tuple[str, str]:
    return str(metrics_file(stage)), str(timing_file(stage))


def _metrics(text: str, where: str) -> dict[str, Any]:
    """The values of a metrics file by dotted key."""
    values = dict(flat(checked(parse_json(text, where, RERUN), dict[str, JsonValue], where, RERUN)))
    check_writable(values, where, RERUN)
    return values


def _harness(text: str, where: str) -> HarnessResults:
    return checked(parse_json(text, where, RERUN_HARNESS), HarnessResults, where, RERUN_HARNESS)


def _values(text: str, where: str) -> dict[str, Any]:
    """The values of a params.yaml, for a run of which no dvc.lock is left."""
    return param_values(checked(parse_yaml(text, where) or {}, dict[str, Any], where))


def _read_here(path: str) -> str | None:
    try:
        return _decoded(Path(path).read_bytes(), path)
    except FileNotFoundError:
        return None


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        fix = FIX if where.startswith(LOCK) else RERUN
        raise UserError(f"{where} is not valid UTF-8 ({error}){fix}") from None


def _open(revision: str) -> Any:
    """The files of a revision as DVC's file system. Raises UserError if Git and DVC do not know it."""
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.scm import resolve_rev

    try:
        with Repo() as repo:
            commit = resolve_rev(repo.scm, revision)
        if subprocess.run(
            ["git", "cat-file", "-e", f"{commit}^{{commit}}"], capture_output=True, check=False
        ).returncode:
            raise UserError(f"{revision!r} is not a commit but a file or folder of one: name the commit")
        files = DVCFileSystem(rev=commit)
        _ = files.repo
    except DvcException as error:
        raise UserError(f"{one_line(error)}: name a commit, branch, tag or experiment") from None
    return files


def _reader(files: Any, revision: str) -> Callable[[str], str | None]:
    """Return a function that reads a file of the project at this revision. It returns None if the file is missing."""
    from dvc.exceptions import DvcException

    def read(path: str) -> str | None:
        try:
            content = files.read_bytes(path)
        except (OSError, DvcException):  # also when DVC knows the file but its cache does not hold it
            return None
        return _decoded(content, f"{path} of {revision}")

    return read


def _changes_of(files: Any, lock: str | None, runs: dict[str, StageRun]) -> Changes:
    """How the revision's own params, code and data differ from those that its dvc.lock recorded."""
    if lock is None:
        return Changes(unknown=f"it has no {LOCK}")
    try:
        return changes(files.repo, runs)
    except Exception as error:  # as in workspace_changes
        return Changes(unknown=one_line(error))


def _curve(tsv: str, where: str) -> list[tuple[int, float]]:
    """(step, value) of the lines of a curve's file after its header."""
    points = []
    for number, line in enumerate(tsv.splitlines()[1:], 2):
        row = line.split("\t")
        try:
            step, value = int(row[0]), float(row[1])
        except (ValueError, IndexError):
            step, value = -1, math.nan
        if len(row) != 2 or not 0 <= step < 2**53 or not math.isfinite(value):
            raise UserError(f"{where} line {number} is not a step and a finite number{RERUN}")
        points.append((step, value))
    return points
