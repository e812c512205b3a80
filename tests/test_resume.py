"""Training that was stopped goes on, whatever stopped it, and ends in the bytes of a run that nothing stopped."""

import csv
import json
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
from conftest import ROOT, digests, metrics, run_stage, set_params, stage

pytestmark = pytest.mark.slow

TRAIN = {"epochs": 2, "checkpoint_every_steps": 3}


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
        """Until a checkpoint of this step or a later one is there."""
        while not any(saved >= step for saved in checkpoints(self.folder)):
            assert self.process.poll() is None, self.process.stdout.read()
            time.sleep(0.01)

    def ranks(self) -> list[psutil.Process]:
        return [child for child in self.process.children(recursive=True) if "finetune_lora.py" in str(child.cmdline())]

    def ended(self, ranks: list[psutil.Process]) -> tuple[float, str]:
        """Wait for the end of it and of its ranks; the seconds that took, and what it printed."""
        begun = time.monotonic()
        printed, _ = self.process.communicate(timeout=60)
        _, alive = psutil.wait_procs(ranks, timeout=60)
        assert not alive
        return time.monotonic() - begun, printed


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(saved.name[5:]) for saved in folder.glob(".scratch/checkpoints/*/step_*"))


def curve(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"plots/training/plots/metrics/{name}.tsv").open() as file:
        return list(csv.DictReader(file, delimiter="\t"))


def assert_same_run(one: Path, other: Path) -> None:
    assert digests(one / "artifacts/lora_adapter") == digests(other / "artifacts/lora_adapter")
    assert metrics(one, "finetune_lora") == metrics(other, "finetune_lora")
    for name in ("train/loss", "train/lr", "train/grad_norm", "validation/loss"):  # no step lost, none twice
        assert curve(one, name) == curve(other, name)


def test_killed_ranks_and_launchers_and_the_same_bytes(trained: Callable[..., Path]) -> None:
    """tp 3: a rank is killed in the first epoch, the launcher in the second."""
    whole = trained("whole", train=TRAIN)
    steps = metrics(whole, "finetune_lora")["steps"]
    broken = trained("broken", train=TRAIN)
    shutil.rmtree(broken / "artifacts/lora_adapter")
    assert not list(broken.glob(".scratch/checkpoints/*"))  # done runs leave none

    training = Training(broken)
    training.wait_for_step(6)
    ranks = training.ranks()
    assert len(ranks) == 3
    ranks[1].kill()
    seconds, printed = training.ended(ranks)
    assert seconds < 30
    assert training.process.returncode == 1
    (line,) = [line for line in printed.splitlines() if "error: " in line]
    assert "rank 1 failed: Signal 9 (SIGKILL)" in line
    assert "run it again to go on" in line
    assert "Traceback" not in printed
    assert not list((broken / "artifacts").glob(".*"))  # nor half an adapter
    assert not (broken / "artifacts/lora_adapter").exists()
    assert len(checkpoints(broken)) == 2  # train.checkpoints_kept

    training = Training(broken)
    training.wait_for_step(steps // 2 + 3)
    ranks = training.ranks()
    training.process.kill()
    seconds, printed = training.ended(ranks)
    assert seconds < 30
    assert "going on from step" in printed
    assert "scoring the base model" not in printed

    done = stage("finetune_lora", broken)
    assert done.returncode == 0, done.stderr
    assert "going on from step" in done.stdout
    assert_same_run(whole, broken)


@pytest.mark.parametrize(("tp_size", "dp_size"), [(1, 1), (1, 2)], ids=["tp1", "dp2"])
def test_sigterm_and_the_same_bytes(trained: Callable[..., Path], tp_size: int, dp_size: int) -> None:
    """With accumulated micro-batches, and a validation at a step that ends no epoch."""
    sections: dict[str, Any] = {
        "convert": {"tp_size": tp_size},
        "train": {**TRAIN, "dp_size": dp_size, "global_batch_size": 4, "max_steps": 17},
    }
    whole, broken = trained("whole", **sections), trained("broken", **sections)
    training = Training(broken)
    training.wait_for_step(3)
    ranks = training.ranks()
    training.process.send_signal(signal.SIGTERM)
    seconds, printed = training.ended(ranks)
    assert seconds < 10
    assert "error: training was stopped by SIGTERM; run it again to go on" in printed
    assert "Traceback" not in printed
    run_stage("finetune_lora", broken)
    assert_same_run(whole, broken)


def test_a_damaged_checkpoint_or_one_of_another_run_is_not_used(trained: Callable[..., Path]) -> None:
    folder = trained("run", train=TRAIN)
    training = Training(folder)
    training.wait_for_step(6)
    ranks = training.ranks()
    training.process.kill()
    training.ended(ranks)
    first, last = checkpoints(folder)[-2:]

    (damaged,) = folder.glob(f".scratch/checkpoints/*/step_{last:08d}/tp_rank_02.pt")
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    set_params(folder, train={"lr": 2.0e-2, "max_steps": 1})
    assert "going on" not in stage("finetune_lora", folder).stdout

    set_params(folder, train={"lr": 1.0e-2, "max_steps": None})
    done = stage("finetune_lora", folder)
    assert f"checkpoint passed over: {damaged.relative_to(folder)} is damaged" in done.stdout
    assert f"going on from step {first} of" in done.stdout


def test_what_is_not_finite_stops_with_step_rows_and_checkpoint(trained: Callable[..., Path]) -> None:
    """A learning rate that no float32 survives: the loss is NaN as soon as it has been applied."""
    folder = trained("run", train={"max_steps": 1})
    before = digests(folder / "artifacts/lora_adapter")
    set_params(folder, train={"max_steps": None, "lr": 1.0e36, "checkpoint_every_steps": 1})
    done = stage("finetune_lora", folder)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert "Traceback" not in done.stderr
    assert "at step 2 on lines " in line
    assert "last good checkpoint: .scratch/checkpoints/" in line
    assert line.endswith("step_00000001")
    numbers = line.split(" on lines ")[1].split(" of data.source")[0]
    rows = len((folder / "rows.jsonl").read_text().splitlines())
    assert all(1 <= int(number) <= rows for number in numbers.removesuffix(" …").split(", "))
    assert digests(folder / "artifacts/lora_adapter") == before


def test_two_trainings_do_not_write_the_same_out(trained: Callable[..., Path]) -> None:
    folder = trained("run", train=TRAIN)
    training = Training(folder)
    training.wait_for_step(3)
    ranks = training.ranks()
    for rank in ranks:  # it would be done before the second has imported what it needs
        rank.suspend()
    second = stage("finetune_lora", folder)
    for rank in ranks:
        rank.resume()
    assert second.returncode == 1
    assert "another process is writing artifacts/.lora_adapter.partial" in second.stderr
    _, printed = training.ended([])
    assert training.process.returncode == 0, printed
    assert json.loads((folder / "metrics/finetune_lora.json").read_text())["steps"] > 3
