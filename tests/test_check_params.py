"""Params that cannot run are refused before DVC deletes an output, and do not stay in the working tree."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT
from support.project import Project
from support.repro import ran


def contents(project: Project) -> dict[str, str]:
    """sha256 of every output, metric, curve and of params.yaml and dvc.lock, by path."""
    names = ("artifacts", "metrics", "plots", "params.yaml", "dvc.lock", "data")
    files = [file for name in names for file in sorted(project.root.joinpath(name).rglob("*")) or [project.root / name]]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}


def refused(project: Project, *command: str) -> str:
    """The line with which the command ends. Nothing that it could have changed has changed."""
    before = contents(project)
    printed = project.run(*command, check=False)
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert ran(printed) in ([], ["check_params"])
    assert "Traceback" not in printed
    assert contents(project) == before
    return line


EXPERIMENT = (".venv/bin/dvc", "exp", "run")
RESTORED = "(params.yaml is again as it was before `dvc exp run`)"


@pytest.mark.slow
def test_an_experiment_with_bad_params_leaves_the_working_tree_as_it_was(finished_copy: Project) -> None:
    project = finished_copy
    params = project.root / "params.yaml"
    edited = params.read_text("utf-8").replace("seed: 17", "seed: 18  # mine", 1) + "\n\n# my note"
    for before in (None, edited, None):  # the last time, an older stash of DVC's is in Git's store
        project.run("git", "checkout", "--quiet", "params.yaml")
        if before:
            params.write_text(before, "utf-8")
        line = refused(project, *EXPERIMENT, "--set-param", "train.lr=oops")
        assert "params.yaml: train.lr: Input should be a valid number" in line
        assert RESTORED in line
        changed = project.run("git", "status", "--porcelain", "--untracked-files=no")
        assert changed == (" M params.yaml\n" if before else "")

    # Known from the model, which is there: training would have found it.
    line = refused(project, *EXPERIMENT, "-S", "convert.tp_size=5", "-S", "train.dp_size=1")
    assert "num_attention_heads % tp_size == 0 fails" in line
    assert RESTORED in line
    line = refused(project, *EXPERIMENT, "-S", "data.source=path://data/none.jsonl")
    assert "data.source: there is no data/none.jsonl" in line

    # What is not the command's own change stays.
    params.write_text(edited.replace("r: ", "r: 5", 1).replace("epochs: ", "epochs: x", 1), "utf-8")
    assert RESTORED not in refused(project, *EXPERIMENT)
    assert RESTORED not in refused(project, ".venv/bin/dvc", "repro")
    assert RESTORED not in refused(project, ".venv/bin/dvc", "repro", "--force", "eval_vllm")


def test_a_second_experiment_at_once_does_not_take_the_stash_of_the_first(tmp_path: Path) -> None:
    own = "from trnlora.preflight.experiment import restore_params; raise SystemExit(f'restored: {restore_params()}')"
    (tmp_path / "refuse.py").write_text(own, "utf-8")
    (tmp_path / "dvc.yaml").write_text(
        f"stages: {{refuse: {{cmd: {sys.executable} refuse.py, params: [lr]}}}}\n", "utf-8"
    )
    params = tmp_path / "params.yaml"
    committed, edited = "lr: 1\n", "lr: 2  # mine\n"
    params.write_text(committed, "utf-8")
    author = {f"GIT_{who}_{what}": "a@b.example" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    env = os.environ | author | {"PYTHONPATH": str(ROOT)}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    dvc = str(Path(sys.executable).with_name("dvc"))
    for command in (("git", "init", "-q"), (dvc, "init", "-q"), ("git", "add", "."), ("git", "commit", "-qm", "First")):
        assert run(*command).returncode == 0
    for before in (edited, committed, edited):
        params.write_text(before, "utf-8")
        done = run(dvc, "exp", "run", "--set-param", "lr=3")
        assert "restored: True" in done.stderr, done.stdout + done.stderr
        assert params.read_text("utf-8") == before


@pytest.mark.slow
def test_other_params_run_the_check_alone(finished_copy: Project) -> None:
    project = finished_copy
    project.set_params(serve={"port": 8001})
    assert ran(project.dvc("repro")) == ["check_params"]
    assert ran(project.dvc("repro")) == []
    (project.root / "artifacts/params_checked").unlink()
    assert ran(project.dvc("repro")) == ["check_params"]


@pytest.mark.slow
def test_a_sweep_whose_experiment_fails_says_so(finished_copy: Project) -> None:
    project = finished_copy
    make = ("make", "--old-file=.venv/.ready")
    assert "lora.r=0: lora.r: Input should be greater" in refused(project, *make, "sweep", "SET=lora.r=4,0")
    assert project.dvc("queue", "status").startswith("No experiment tasks in the queue.")
    # flatten_adapter is wrong in what is committed: training is well, what follows is not.
    stage = project.root / "stages/flatten_adapter.py"
    stage.write_text("raise SystemExit('error: on purpose')\n", "utf-8")
    project.commit("A stage that fails")
    printed = project.run(*make, "sweep", "SET=eval.max_prompts=7", "NAME=fails", check=False)
    assert printed.count("error: without a result: fails (failed); `dvc queue logs fails` shows why") == 1, printed
    assert "make: *** [" in printed
    assert "on purpose" in project.dvc("queue", "logs", "fails")
