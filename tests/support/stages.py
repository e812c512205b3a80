"""Stages run as a user runs them, in a folder without Git and DVC."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from support import ROOT
from support.forked import run_forked


def stage(name: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_forked(ROOT / "stages" / f"{name}.py", *arguments, cwd=folder, env=dict(os.environ))


def run_stage(name: str, folder: Path) -> None:
    done = stage(name, folder)
    assert done.returncode == 0, done.stdout + done.stderr


def peak_memory(name: str, folder: Path) -> int:
    """Run a stage. Returns the peak of the sum over its processes (proportional set size, sampled) in bytes."""
    running = psutil.Popen([sys.executable, str(ROOT / "stages" / f"{name}.py")], cwd=folder)
    peak = 0
    while running.poll() is None:
        with contextlib.suppress(psutil.Error):  # a process has just ended
            tree = (running, *running.children(recursive=True))
            peak = max(peak, sum(process.memory_full_info().pss for process in tree))
        time.sleep(0.2)
    assert running.returncode == 0
    return peak


def set_params(folder: Path, **sections: dict[str, Any]) -> None:
    path = folder / "params.yaml"
    params = yaml.safe_load((path if path.exists() else ROOT / "params.yaml").read_text())
    for section, values in sections.items():
        params[section].update(values)
    path.write_text(yaml.safe_dump(params))


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def metrics(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "metrics" / f"{name}.json").read_text())
