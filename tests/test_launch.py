"""The launch files: their shell against shellcheck, and that they start what they say. No cluster is needed or asked.

SkyPilot's own schema was run by hand on launch/sky.yaml (its package wants a hundred others): see docs/scale.md.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

SKY = yaml.safe_load((ROOT / "launch/sky.yaml").read_text("utf-8"))
SCRIPTS = {
    "slurm": (ROOT / "launch/slurm.sbatch").read_text("utf-8"),
    "sky-setup": "#!/usr/bin/env bash\n" + SKY["setup"],
    "sky-run": "#!/usr/bin/env bash\n" + SKY["run"],
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_has_nothing_to_say(name: str) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, "-"], input=SCRIPTS[name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def run_script(tmp_path: Path, script: str, *arguments: str, **env: str) -> list[str]:
    """Run it where `dvc` and `python` only print what they were called with, and with which rendezvous."""
    binaries = tmp_path / ".venv/bin"
    binaries.mkdir(parents=True)
    for name in ("dvc", "python"):
        (binaries / name).write_text(f'#!/bin/sh\necho {name} "$@" "$PET_NNODES $PET_NODE_RANK $PET_MASTER_ADDR"\n')
        (binaries / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-s", "--", *arguments], input=script, cwd=tmp_path, env={"PATH": "/usr/bin:/bin", **env},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [line.strip() for line in done.stdout.splitlines()]


def test_slurm_runs_dvc(tmp_path: Path) -> None:
    for number, arguments in enumerate([(), ("exp", "run", "-S", "train.dp_size=4")]):
        root = tmp_path / str(number)
        env = {"SLURM_SUBMIT_DIR": str(root), "SLURM_CPUS_ON_NODE": "192"}
        assert run_script(root, SCRIPTS["slurm"], *arguments, **env) == [" ".join(["dvc", *(arguments or ["repro"])])]


def test_sky_gives_every_node_its_part(tmp_path: Path) -> None:
    env = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6"}
    first = run_script(tmp_path / "0", SCRIPTS["sky-run"], SKYPILOT_NODE_RANK="0", **env)
    assert first == ["dvc repro 2 0 10.0.0.5", "dvc push 2 0 10.0.0.5"]
    second = run_script(tmp_path / "1", SCRIPTS["sky-run"], SKYPILOT_NODE_RANK="1", **env)
    assert second == [
        "dvc repro prepare_data convert_nxd 2 1 10.0.0.5",
        "python stages/finetune_lora.py 2 1 10.0.0.5",
    ]
