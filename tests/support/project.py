"""Copies of the project as separate Git and DVC repositories."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from support import ROOT


class Project:
    """A copy of the project's files in its own Git and DVC repository.

    Its .venv is this environment, which is not on PATH: commands run as for a user who has not activated it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        environment = Path(sys.executable).parent
        self.env = {
            **os.environ,
            "PATH": ":".join(entry for entry in os.environ["PATH"].split(":") if Path(entry) != environment),
            "GIT_AUTHOR_NAME": "test",
            "GIT_AUTHOR_EMAIL": "test@example.com",
            "GIT_COMMITTER_NAME": "test",
            "GIT_COMMITTER_EMAIL": "test@example.com",
        }
        for name in ("VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL", "MFLAGS"):
            self.env.pop(name, None)

    def run(self, *command: str | Path, check: bool = True) -> str:
        """Run a command in the project and return its output, including stderr."""
        done = subprocess.run(
            command,
            cwd=self.root,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command} failed with exit code {done.returncode}:\n{done.stdout}"
        return done.stdout

    def dvc(self, *arguments: str) -> str:
        return self.run(".venv/bin/dvc", *arguments)

    def commit(self, message: str) -> None:
        self.run("git", "add", "-A")
        self.run("git", "commit", "-qm", message)

    def set_params(self, **sections: dict[str, Any]) -> None:
        """Overwrite keys of params.yaml, section by section."""
        path = self.root / "params.yaml"
        params = yaml.safe_load(path.read_text("utf-8"))
        for section, values in sections.items():
            assert values.keys() <= params[section].keys()
            params[section].update(values)
        path.write_text(yaml.safe_dump(params, sort_keys=False), "utf-8")


def make_project(root: Path, model: Path) -> Project:
    """Make a fresh repository in `root`: the working tree's files without results, and params for the tiny Llama."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    copy = Project(root)
    for name in filter(None, listed.stdout.split("\0")):
        source = ROOT / name
        if source.is_file() and name != "dvc.lock" and not name.startswith(("metrics/", "plots/", "tests/")):
            target = copy.root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    copy.set_params(
        model={"source": f"path://{model}", "sha256": None},
        data={"seq_len": 256},
        lora={"lora_dropout": 0.05},
        train={"max_steps": 20, "lr": 1.0e-2},
        eval={"max_tokens": 16, "max_prompts": 8, "min_changed_fraction": 0.0},
        serve={"max_model_len": 512},
    )
    (copy.root / ".venv").symlink_to(sys.prefix)
    copy.run("git", "init", "-q")
    copy.commit("The project")
    return copy


def copy_project(project: Project, root: Path) -> Project:
    """Copy a project with its results, DVC cache and history to `root`."""
    shutil.copytree(project.root, root, symlinks=True)
    copy = Project(root)
    copy.env = dict(project.env)
    return copy
