"""`dvc repro` in a copy of the project: in the background, killed, and once per session undisturbed."""

import hashlib
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from support.project import Project, make_project
from trnlora.params import Params

ORDER = [
    "check_params", "fetch_model", "prepare_data", "convert_nxd", "finetune_lora", "flatten_adapter", "eval_vllm",
]  # fmt: skip

CANARY = "caNary7f3a"
SECRETS = {
    name: f"{CANARY}-{name.lower()}"
    for name in (
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "VLLM_API_KEY",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
    )
}

# Appended to params.py of a project under test: records which stage reads which param.
NOTE_READS = """
import os as _os, sys as _sys

def _noted(self, name):
    if name in type(self).model_fields and _sys._getframe(1).f_code.co_filename != __file__:
        section = type(self).__name__.lower()
        key = {"params": name, "datasource": "data.source"}.get(section, f"{section}.{name}")
        with open(".params_read", "a") as notes:
            notes.write(f"{_os.environ.get('DVC_STAGE')} {key}\\n")
    return StrictModel.__getattribute__(self, name)

Section.__getattribute__ = _noted
"""


def ran(output: str) -> list[str]:
    return re.findall(r"Running stage '(\w+)'", output)


def params_read(project: Project) -> dict[str, set[str]]:
    """The params that each stage read in a run."""
    sections = set(Params.model_fields) - {"backend"}  # not a section but a value
    reads: dict[str, set[str]] = {}
    for line in (project.root / ".params_read").read_text("utf-8").splitlines():
        stage, key = line.split()
        if key not in sections:  # reading a section does not read a value
            reads.setdefault(stage, set()).add(key)
    return reads


def check_cache(project: Project) -> None:
    """Check that no file in the cache was changed: its name there is its md5."""
    files = [path for path in (project.root / ".dvc/cache/files/md5").rglob("*") if path.is_file()]
    assert files
    for path in files:
        digest = hashlib.md5(path.read_bytes()).hexdigest()
        assert path.parent.name + path.name.removesuffix(".dir") == digest, f"{path} was changed in place"


class Repro:
    """`dvc repro` in the background. Records when each stage started."""

    def __init__(self, project: Project, *arguments: str) -> None:
        self.project = project
        self.log = project.root.parent / f"{project.root.name}-{time.monotonic_ns()}.log"
        with self.log.open("w") as log:
            self.process = psutil.Popen(
                [".venv/bin/dvc", "repro", *arguments],
                cwd=project.root,
                env=project.env | {"PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.began: dict[str, float] = {}

    def printed(self) -> str:
        return self.log.read_text("utf-8")

    def alive(self) -> bool:
        """Whether it is running. Also records the stages that have started since the last call."""
        running = self.process.poll() is None
        for name in ran(self.printed()):
            self.began.setdefault(name, time.monotonic())
        return running

    def processes(self) -> list[psutil.Process]:
        """All processes that this run has started, in any session: those whose working directory is the project."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.cwd() == str(self.project.root):
                    found.append(process)
            except psutil.Error:  # it has just ended
                continue
        return found

    def kill(self) -> None:
        for process in [self.process, *self.processes()]:
            try:
                process.kill()
            except psutil.NoSuchProcess:  # the kernel ends a rank with its launcher
                continue
        self.process.wait()
        psutil.wait_procs(self.processes(), timeout=30)
        assert not self.processes()


@dataclass
class Finished:
    """A project after `dvc repro`, committed. Only for reading: `finished_copy` in conftest.py may be changed."""

    project: Project
    seconds: dict[str, float]  # of each stage
    printed: str


def run_undisturbed(root: Path, model: Path) -> Finished:
    """Run the pipeline in `root` with secrets (canaries) in the environment. Records which stage reads which param."""
    project = make_project(root, model)
    params_py = project.root / "trnlora" / "params.py"
    params_py.write_text(params_py.read_text("utf-8") + NOTE_READS, "utf-8")
    with (project.root / ".git" / "info" / "exclude").open("a") as exclude:
        exclude.write("/.params_read\n")
    project.commit("Record which params are read")
    project.env |= SECRETS
    run = Repro(project)
    while run.alive():
        time.sleep(0.05)
    assert run.process.returncode == 0, run.printed()
    assert list(run.began) == ORDER
    ends = [*list(run.began.values())[1:], time.monotonic()]
    seconds = {name: end - run.began[name] for name, end in zip(ORDER, ends, strict=True)}
    project.commit("A run")
    return Finished(project, seconds, run.printed())
