"""What DVC recorded of the last run in dvc.lock, and how the project has changed since.

dvc.lock holds, for each stage, the values of the params that it read, and the md5 of its code, of its other inputs and
of what it wrote, metrics and plots included. DVC computes the digests, and remembers those of files that it knows.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel

from trnlora import paths
from trnlora.metrics import stages as stages_with_results
from trnlora.readers import checked, parse_yaml, read_text, read_yaml

LOCK = "dvc.lock"
FIX = ": resolve the conflict, or `git checkout dvc.lock` for that of the last commit"
FEW = 4  # params, and files, that one line names


class _File(BaseModel):
    path: str
    md5: str = ""


class _Stage(BaseModel):
    deps: list[_File] = []
    params: dict[str, dict[str, Any]] = {}
    outs: list[_File] = []


class _Lock(BaseModel):
    stages: dict[str, _Stage] = {}


@dataclass(frozen=True)
class StageRun:
    """What dvc.lock recorded of a stage's last run."""

    params: dict[str, Any]  # by `section.key`
    deps: dict[str, str]  # md5 by path
    outs: dict[str, str]


def parse_lock(text: str, where: str = LOCK) -> dict[str, StageRun]:
    """The runs in the text of a dvc.lock, by stage. Raises UserError for what is not one, e.g. in a merge conflict."""
    lock = checked(parse_yaml(text, where, FIX) or {}, _Lock, where, FIX)
    return {
        name: StageRun(
            stage.params.get(str(paths.PARAMS), {}),
            {file.path: file.md5 for file in stage.deps},
            {file.path: file.md5 for file in stage.outs},
        )
        for name, stage in lock.stages.items()
    }


def recorded_params(runs: Mapping[str, StageRun], order: Iterable[str]) -> dict[str, Any]:
    """The params that the stages read, by `section.key`. Where they differ, the value of the last stage in `order`."""
    return {key: value for stage in order if stage in runs for key, value in runs[stage].params.items()}


def param_values(sections: dict[str, Any]) -> dict[str, Any]:
    """The values of a params file by `section.key`, as dvc.lock records them: a dict in a section is one value."""
    values: dict[str, Any] = {}
    for name, section in sections.items():
        values |= (
            {f"{name}.{key}": value for key, value in section.items()} if isinstance(section, dict) else {name: section}
        )
    return values


@dataclass(frozen=True)
class Changes:
    """How a project differs from what dvc.lock recorded. Everything is empty where nothing has changed."""

    stages: list[str] = field(default_factory=list)  # whose results are older than what they depend on; in order
    params: list[tuple[str, Any, Any]] = field(default_factory=list)  # key, recorded value, value now
    files: list[str] = field(default_factory=list)  # code, data and other inputs that changed since
    mixed: list[str] = field(default_factory=list)  # which stages are of different runs, as clauses
    modified: list[str] = field(default_factory=list)  # metrics, plots and other outputs that no run wrote like this
    unknown: str | None = None  # why nothing is known of the above

    def covers(self, path: Path) -> bool:
        """Whether a file of the project is, or is in, an input that changed."""
        return any(path.absolute().is_relative_to(Path(file).absolute()) for file in self.files)

    def lines(self, name: str = "") -> list[str]:
        """What a terminal shows: a line for each kind of change, none where there is none. `name`: of the revision."""
        of, fix = (f" ({name})", "") if name else ("", "; `make repro` updates them")
        lines = []
        if self.stages:
            changed = [f"{key} {_shown(was)} → {_shown(now)}" for key, was, now in self.params]
            clauses = [_few(changed), f"changed: {_few(self.files)}" if self.files else "", *self.mixed]
            reasons = "; ".join(filter(None, clauses))
            older = f"the results of {', '.join(self.stages)} are older than what they depend on"
            lines.append(f"stale{of}: {older}: {reasons}{fix}")
        if self.modified:
            lines.append(f"modified since the run{of}: {_few(self.modified)}{fix}")
        if self.unknown:
            lines.append(f"unknown{of} whether the results are of these params, code and data: {self.unknown}")
        return lines


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _few(names: list[str]) -> str:
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return ", ".join(names[:FEW]) + more


def workspace_changes(only: str | None = None) -> Changes:
    """How the working tree differs from its dvc.lock. `only`: look at this stage and nothing else.

    Outputs that are not here (`dvc pull` never ran) do not count as changes. Takes half a second, and longer where DVC
    does not know the digests of large files yet. Raises UserError if dvc.lock is not readable.
    """
    from dvc.repo import Repo

    lock = Path(LOCK)
    if not lock.is_file():
        return Changes(unknown=f"there is no {LOCK}")
    runs = parse_lock(read_text(lock, FIX))
    try:
        read_yaml(paths.PARAMS)
        with Repo() as repo:
            return changes(repo, runs, only)
    except Exception as error:  # DVC has errors of many kinds for odd files, e.g. TypeError for a date in params.yaml
        return Changes(unknown=one_line(error))


def one_line(error: BaseException) -> str:
    """An error of DVC, or another one, without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def changes(repo: Any, runs: Mapping[str, StageRun], only: str | None = None) -> Changes:
    """How a dvc.repo.Repo (of the working tree or of a revision) differs from the runs in its dvc.lock.

    check_params is left out: no result depends on it.
    """
    names = stages_with_results() if only is None else (only,)
    stages = [stage for stage in repo.index.stages if getattr(stage, "name", None) in names]
    found, direct = Changes(), set()
    for stage in stages:
        run = runs.get(stage.name)
        found.modified.extend(_modified(stage, run))
        if run is None:
            continue
        params, files = list(_changed_params(stage, run)), list(_changed_files(stage, run, runs))
        files += ["its command in dvc.yaml"] * bool(stage.cmd_changed)
        mixed = list(_mixed(stage.name, run, runs))
        if params or files or mixed:
            direct.add(stage.name)
        found.params.extend(param for param in params if param not in found.params)
        found.files.extend(file for file in files if file not in found.files)
        found.mixed.extend(mixed)
    outdated: set[str] = set()  # outputs
    for stage in stages:
        run = runs.get(stage.name)
        if run and (stage.name in direct or any(_within(dep, outdated) for dep in run.deps)):
            found.stages.append(stage.name)
            outdated |= set(run.outs)
    return found


def _changed_params(stage: Any, run: StageRun) -> Iterator[tuple[str, Any, Any]]:
    from dvc.dependency import ParamsDependency

    for dep in stage.deps:
        if isinstance(dep, ParamsDependency) and dep.def_path == str(paths.PARAMS):
            now = dep.read_params()
            for key in dep.params:
                if key not in run.params or key not in now or run.params[key] != now[key]:
                    yield key, run.params.get(key, "not recorded"), now.get(key, "missing")


def _changed_files(stage: Any, run: StageRun, runs: Mapping[str, StageRun]) -> Iterator[str]:
    """The inputs that no stage writes: those that differ, are new in dvc.yaml or are missing."""
    from dvc.dependency import ParamsDependency

    made = {path for other in runs.values() for path in other.outs}
    for dep in stage.deps:
        if isinstance(dep, ParamsDependency) and dep.def_path == str(paths.PARAMS):
            continue
        if _within(dep.def_path, made):
            continue
        if isinstance(dep, ParamsDependency):
            if dep.workspace_status():
                yield dep.def_path
        elif not dep.exists or _digest(dep) != run.deps.get(dep.def_path):
            yield dep.def_path


def _mixed(stage: str, run: StageRun, runs: Mapping[str, StageRun]) -> Iterator[str]:
    """Clauses about inputs that another stage has written again since."""
    for other, theirs in runs.items():
        rewritten = [path for path, digest in theirs.outs.items() if run.deps.get(path, digest) != digest]
        if rewritten:
            yield f"{stage} ran before the last {other} ({_few(rewritten)})"


def _modified(stage: Any, run: StageRun | None) -> Iterator[str]:
    for out in stage.outs:
        if out.exists:
            if run is None:
                yield f"{out.def_path} (no run of {stage.name} is recorded)"
            elif _digest(out) != run.outs.get(out.def_path):
                yield out.def_path
        elif run is not None and not out.use_cache:
            yield f"{out.def_path} (missing)"


def _digest(item: Any) -> str:
    """md5 of a file or folder (dvc.output.Output) as DVC computes it, without what .dvcignore names."""
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.tree import Tree

    ignore = item.repo.dvcignore
    _, _, found = build(item.local_cache, item.fs_path, item.fs, "md5", ignore=ignore, dry_run=True)
    if isinstance(found, Tree):  # again, since DVC does not apply .dvcignore to the folders of a revision
        kept = Tree()
        for key, meta, digest in found:
            if not ignore.is_ignored_file(item.fs.join(item.fs_path, *key)):
                kept.add(key, meta, digest)
        kept.digest()
        found = kept
    return str(found.hash_info.value)


def _within(path: str, folders: Iterable[str]) -> bool:
    """Whether a path is one of these, or is in one of these."""
    return any(PurePosixPath(path).is_relative_to(folder) for folder in folders)
