"""Training resumes after any interruption and ends with the same bytes as an uninterrupted run."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import ROOT
from support.runs import STOPS_EARLY, TRAIN
from support.stages import digests, metrics, run_stage, set_params, stage

from trnlora.errors import UserError
from trnlora.training.checkpoints import RUN, find

pytestmark = pytest.mark.slow

ONE_RANK = {"tp_size": 1}  # for tests in which sharding does not matter
DEAD_SECONDS = 30  # docs/promises.md


class Training:
    """finetune_lora in the background."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = psutil.Popen(
            [sys.executable, str(ROOT / "stages/finetune_lora.py")],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for_step(self, step: int) -> None:
        """Wait until there is a checkpoint of this step or a later one."""
        while not any(saved >= step for saved in checkpoints(self.folder)):
            assert self.process.poll() is None, self.process.stdout.read()
            time.sleep(0.01)

    def ranks(self) -> list[psutil.Process]:
        """The ranks: forks of the server that has imported their libraries, which is a child of the launcher."""
        (server,) = [child for child in self.process.children() if "multiprocessing.forkserver" in str(child.cmdline())]
        return server.children()

    def ended(self, ranks: list[psutil.Process]) -> str:
        """Its output. Waits until it and its ranks have ended, for at most DEAD_SECONDS."""
        printed, _ = self.process.communicate(timeout=DEAD_SECONDS)
        _, alive = psutil.wait_procs(ranks, timeout=DEAD_SECONDS)
        assert not alive
        return printed

    def stopped_at(self, step: int) -> None:
        """Kill the launcher as soon as there is a checkpoint of this step, and wait until the ranks have ended."""
        self.wait_for_step(step)
        ranks = self.ranks()
        self.process.kill()
        self.ended(ranks)


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(saved.name[5:]) for saved in folder.glob(".scratch/checkpoints/*/*/step_*"))


def curve(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"plots/training/plots/metrics/{name}.tsv").open() as file:
        return list(csv.DictReader(file, delimiter="\t"))


def assert_same_run(one: Path, other: Path) -> None:
    assert digests(one / "artifacts/lora_adapter") == digests(other / "artifacts/lora_adapter")
    assert metrics(one, "finetune_lora") == metrics(other, "finetune_lora")
    for name in ("train/loss", "train/lr", "train/grad_norm", "validation/loss"):  # no step is lost or repeated
        assert curve(one, name) == curve(other, name)


def test_killed_ranks_and_launchers_and_the_same_bytes(
    trained: Callable[..., Path], converted: Callable[..., Path]
) -> None:
    """tp 3: a rank is killed in the first epoch, the launcher in the second."""
    whole, broken = trained("whole", train=TRAIN), converted("broken", train=TRAIN)
    steps = metrics(whole, "finetune_lora")["steps"]
    assert not list(whole.glob(".scratch/checkpoints/*"))  # a complete run leaves no checkpoints

    training = Training(broken)
    training.wait_for_step(6)
    ranks = training.ranks()
    assert len(ranks) == 3
    ranks[1].kill()
    printed = training.ended(ranks)
    assert training.process.returncode == 1
    (line,) = [line for line in printed.splitlines() if "error: " in line]
    assert "rank 1 failed: Signal 9 (SIGKILL)" in line
    assert "rerun to resume" in line
    assert "Traceback" not in printed
    assert not list((broken / "artifacts").glob(".*.partial"))  # no part of an adapter either
    assert not (broken / "artifacts/lora_adapter").exists()
    assert len(checkpoints(broken)) == 2  # train.checkpoints_kept

    training = Training(broken)
    training.wait_for_step(steps // 2 + 3)
    ranks = training.ranks()
    training.process.kill()
    printed = training.ended(ranks)
    assert "resuming from step" in printed
    assert "scoring the base model" not in printed

    done = stage("finetune_lora", broken)
    assert done.returncode == 0, done.stderr
    assert "resuming from step" in done.stdout
    assert_same_run(whole, broken)


@pytest.mark.parametrize("dp_size", [pytest.param(1, marks=pytest.mark.long), 2])
def test_sigterm_and_the_same_bytes(trained: Callable[..., Path], converted: Callable[..., Path], dp_size: int) -> None:
    """With accumulated micro-batches (fewer in an epoch's last step), ended by max_steps in the middle of an epoch.

    A resumed run validates within an epoch at the same steps, and once at an epoch's end.
    """
    sections: dict[str, Any] = {
        "convert": ONE_RANK,
        "train": {**TRAIN, "dp_size": dp_size, "global_batch_size": 4, "max_steps": 11, "validate_every_steps": 3},
    }
    whole, broken = trained("whole", **sections), converted("broken", **sections)
    assert metrics(whole, "prepare_data")["train"]["packed_rows"] % 4 > 1
    assert [row["step"] for row in curve(whole, "validation/loss")] == ["0", "3", "6", "9", "11"]
    training = Training(broken)
    training.wait_for_step(3)
    ranks = training.ranks()
    training.process.send_signal(signal.SIGTERM)
    printed = training.ended(ranks)
    assert "error: training stopped by SIGTERM; rerun to resume from the last checkpoint" in printed
    assert "Traceback" not in printed
    run_stage("finetune_lora", broken)
    assert_same_run(whole, broken)


def test_the_best_adapter_and_the_early_end_after_a_kill(
    trained: Callable[..., Path], converted: Callable[..., Path]
) -> None:
    """Resumed after the validation with the lowest loss, and then between the decision to stop and the end."""
    whole, broken = trained("whole", **STOPS_EARLY), converted("broken", **STOPS_EARLY)
    assert [row["step"] for row in curve(whole, "validation/loss")] == ["0", "2", "4", "6", "8", "10"]
    found = metrics(whole, "finetune_lora")
    assert (found["kept_step"], found["steps"], found["stopped_early"]) == (6, 10, True)

    Training(broken).stopped_at(6)
    for saved in broken.glob(".scratch/checkpoints/*/*/step_*"):
        if int(saved.name[5:]) > 6:
            shutil.rmtree(saved)
    partial = broken / "artifacts/.lora_adapter.partial"
    shutil.rmtree(partial, ignore_errors=True)  # what the killed run left, which the next one removes
    training = Training(broken)
    while not partial.is_dir():
        assert training.process.poll() is None, training.process.stdout.read()
        time.sleep(0.01)
    partial.rmdir()
    partial.touch()  # the adapter cannot be written: an error after the last checkpoint
    printed, _ = training.process.communicate(timeout=300)
    assert training.process.returncode == 1
    assert "resuming from step 6 of 36" in printed
    assert "stopped early at step 10 of 36: the lowest validation loss is " in printed
    assert re.search(r"error: training stopped, rank \d failed: artifacts/lora_adapter", printed)
    assert checkpoints(broken) == [3, 6, 9, 10]
    assert not list((broken / "artifacts").glob(".*.partial"))

    done = stage("finetune_lora", broken)
    assert done.returncode == 0, done.stderr
    assert "resuming from step 10 of 36" in done.stdout
    assert "keeping the adapter of step 6 (train.keep: best)" in done.stdout
    assert "tokens/s" not in done.stdout  # no more steps
    assert_same_run(whole, broken)


def test_a_damaged_checkpoint_or_one_of_another_run_is_not_used(converted: Callable[..., Path]) -> None:
    folder = converted("run", train=TRAIN, convert=ONE_RANK)
    Training(folder).stopped_at(6)
    first, last = checkpoints(folder)[-2:]

    (damaged,) = folder.glob(f".scratch/checkpoints/*/*/step_{last:08d}/tp_rank_00.pt")
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    set_params(folder, train={"lr": 2.0e-2, "max_steps": 1})
    assert "resuming" not in stage("finetune_lora", folder).stdout

    set_params(folder, train={"lr": 1.0e-2, "max_steps": None})
    done = stage("finetune_lora", folder)
    assert f"skipping damaged checkpoint: {damaged.relative_to(folder)} is damaged" in done.stdout
    assert f"resuming from step {first} of" in done.stdout


def test_what_is_given_to_resume_from_is_checked(tmp_path: Path) -> None:
    other = tmp_path / "other/code/step_00000003"
    other.mkdir(parents=True)
    (other / RUN).touch()
    for given, reason in (
        (tmp_path / "nowhere", "is not a checkpoint: name a folder "),
        (other, "is of a run with other params or inputs"),
    ):
        with pytest.raises(UserError, match=f"^--resume-from {given} {reason}"):
            find(tmp_path / "run/code", given, {})


def test_an_edit_of_the_code(converted: Callable[..., Path], tmp_path: Path) -> None:
    """Error messages and comments are not part of a run's identity. Code that computes its numbers is, and is named."""
    shutil.copytree(ROOT / "trnlora", tmp_path / "code/trnlora", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "stages", tmp_path / "code/stages")
    shutil.copyfile(ROOT / "dvc.yaml", tmp_path / "code/dvc.yaml")

    def edit(module: str, old: str, new: str) -> None:
        path = tmp_path / "code/trnlora" / module
        text = path.read_text("utf-8")
        assert old in text
        path.write_text(text.replace(old, new), "utf-8")

    def run(*arguments: str) -> str:
        command = [sys.executable, str(tmp_path / "code/stages/finetune_lora.py"), *arguments]
        env = {**os.environ, "PYTHONPATH": str(tmp_path / "code")}
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    folder = converted("run", train=TRAIN, convert=ONE_RANK)
    Training(folder).stopped_at(3)
    kept = tmp_path / "kept"
    shutil.copytree(folder / ".scratch", kept)

    edit("errors.py", "out of memory: close other programs", "memory is short: close other programs")
    edit("training/batches.py", '"""Packed rows in the order', '# A comment.\n"""All packed rows in the order')
    assert "resuming from step" in run()

    edit("training/module.py", "norm + 1e-6", "norm + 2e-6")
    shutil.rmtree(folder / ".scratch", ignore_errors=True)
    shutil.copytree(kept, folder / ".scratch")
    (saved,) = folder.glob(".scratch/checkpoints/*/*/step_00000003")
    printed = run()
    assert "not resuming: the checkpoints of this run in .scratch/checkpoints/" in printed
    assert "are by other code (trnlora.training.module)" in printed
    assert (
        f"--resume-from {saved.relative_to(folder)}; to drop them: rm -r {saved.parent.relative_to(folder)}" in printed
    )
    assert not list(folder.glob(".scratch/checkpoints/*"))  # the run is complete

    shutil.copytree(kept, folder / ".scratch", dirs_exist_ok=True)
    assert "resuming from step 3 of" in run("--resume-from", str(saved.relative_to(folder)))


def test_a_value_that_is_not_finite_stops_with_step_rows_and_checkpoint(trained: Callable[..., Path]) -> None:
    """With this learning rate, float32 overflows: the loss is NaN after the first update."""
    folder = trained("run", train=TRAIN, convert=ONE_RANK)
    before = digests(folder / "artifacts/lora_adapter")
    set_params(folder, train={"lr": 1.0e36, "checkpoint_every_steps": 1})
    done = stage("finetune_lora", folder)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert "Traceback" not in done.stderr
    assert "at step 2 on rows.jsonl line " in line
    assert "last good checkpoint: .scratch/checkpoints/" in line
    assert line.endswith("step_00000001")
    numbers = [int(number) for number in re.findall(r"rows\.jsonl line (\d+)", line)]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] <= len((folder / "rows.jsonl").read_text().splitlines())
    assert digests(folder / "artifacts/lora_adapter") == before


def test_two_trainings_do_not_write_the_same_output(
    trained: Callable[..., Path], converted: Callable[..., Path]
) -> None:
    """The second one leaves every file of the first as it is, which ends in the same bytes as alone.

    The first has outlived its dvc: a second `dvc repro` has deleted the curves that were in place.
    """
    whole, folder = trained("whole", train=TRAIN, convert=ONE_RANK), converted("run", train=TRAIN, convert=ONE_RANK)
    training = Training(folder)
    training.wait_for_step(3)
    ranks = training.ranks()
    for rank in ranks:  # otherwise it would end before the second one has finished its imports
        rank.suspend()
    shutil.rmtree(folder / "plots/training", ignore_errors=True)
    before = digests(folder)
    second = stage("finetune_lora", folder)
    assert digests(folder) == before
    for rank in ranks:
        rank.resume()
    user = f"is in use by process {training.process.pid} ({' '.join(training.process.cmdline())}): wait until"
    assert second.stderr == f"error: artifacts/lora_adapter {user} that is done, or stop it\n"
    assert second.returncode == 1
    printed, _ = training.process.communicate(timeout=300)
    assert training.process.returncode == 0, printed
    assert_same_run(whole, folder)
    assert not list(folder.glob("**/.*.lock"))


def test_the_first_rank_locks_by_itself(converted: Callable[..., Path]) -> None:
    """Under a torchrun of the user's there is no launcher that looks first."""
    folder = converted("run", train=TRAIN, convert=ONE_RANK)
    code = "import sys; from pathlib import Path; from trnlora.files import locked\n"
    code += "with locked(Path('artifacts/lora_adapter')): print(flush=True); sys.stdin.read()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], cwd=folder, stdin=pipe, stdout=pipe) as holder:
        assert holder.stdout
        holder.stdout.readline()
        before = digests(folder)
        command = [str(Path(sys.executable).with_name("torchrun")), str(ROOT / "stages/finetune_lora.py")]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
        assert digests(folder) == before
        holder.communicate()
    assert done.returncode == 1
    assert f"artifacts/lora_adapter is in use by process {holder.pid} " in done.stderr
