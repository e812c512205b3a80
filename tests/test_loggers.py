"""TensorBoard, MLflow and W&B beside DVCLive: refused in one line if not installed, and resumed in the same run."""

import importlib.util
import shutil
import sqlite3
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from support.stages import digests, metrics, stage

from trnlora.errors import UserError
from trnlora.training.loggers import check_installed

TRAIN = {"max_steps": 6, "checkpoint_every_steps": 2, "checkpoints_kept": 9, "validate_every_steps": 3}
ONE_RANK = {"tp_size": 1}


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def need(*names: str) -> None:
    missing = [name for name in names if not installed(name)]
    if missing:
        pytest.skip(f"not installed: .venv/bin/uv pip install --overrides requirements.lock {' '.join(missing)}")


def test_what_is_not_installed_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that W&B or MLflow has left in the working directory is not the package."""
    found = {"tensorboard": None, "wandb": ModuleSpec("wandb", None), "mlflow": ModuleSpec("mlflow", None, origin="x")}
    monkeypatch.setattr(importlib.util, "find_spec", found.__getitem__)
    with pytest.raises(UserError) as refusal:
        check_installed(["tensorboard", "mlflow", "wandb"])
    assert str(refusal.value).startswith("train.loggers names tensorboard and wandb, not installed here: run `")
    assert str(refusal.value).endswith(" tensorboard wandb`")
    check_installed(["mlflow"])
    check_installed([])


@pytest.mark.slow
def test_the_stage_refuses_before_it_trains(converted: Callable[..., Path]) -> None:
    if installed("tensorboard"):
        pytest.skip("tensorboard is installed here")
    folder = converted("run", train={"loggers": ["tensorboard"]}, convert=ONE_RANK)
    done = stage("finetune_lora", folder)
    assert done.returncode == 1
    assert done.stderr.startswith("error: train.loggers names tensorboard, not installed here: run `")
    assert done.stdout == ""


def interrupted_and_resumed(converted: Callable[..., Path], logger: str) -> Path:
    """A run with a logger that ended after its last step, and was resumed from step 2.

    It ends because its metrics cannot be written, so its checkpoints stay; all but that of step 2 are removed.
    """
    folder = converted("run", train={**TRAIN, "loggers": [logger]}, convert=ONE_RANK)
    (folder / "metrics/finetune_lora.json").mkdir()
    assert stage("finetune_lora", folder).returncode == 1
    (folder / "metrics/finetune_lora.json").rmdir()
    for saved in folder.glob(".scratch/checkpoints/*/*/step_*"):
        if saved.name != "step_00000002":
            shutil.rmtree(saved)
    done = stage("finetune_lora", folder)
    assert done.returncode == 0, done.stderr
    assert "resuming from step 2 of 6" in done.stdout
    return folder


@pytest.mark.long
def test_tensorboard(converted: Callable[..., Path], trained: Callable[..., Path]) -> None:
    need("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = interrupted_and_resumed(converted, "tensorboard")
    (run,) = (folder / ".scratch/loggers/tensorboard").iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("validation/loss")] == [0, 3, 6]
    assert events.Scalars("train/loss")[-1].value == pytest.approx(metrics(folder, "finetune_lora")["train_loss"])
    # A logger changes nothing of what is trained.
    plain = trained("plain", train=TRAIN, convert=ONE_RANK)
    assert digests(plain / "artifacts/lora_adapter") == digests(folder / "artifacts/lora_adapter")


@pytest.mark.long
def test_mlflow(converted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    need("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = interrupted_and_resumed(converted, "mlflow")
    with sqlite3.connect(folder / ".scratch/loggers/mlflow.db") as database:
        assert database.execute("SELECT count(*), min(status) FROM runs").fetchall() == [(1, "FINISHED")]
        steps = database.execute("SELECT key, step FROM metrics ORDER BY key, step").fetchall()
        assert ("train/lr", "0.01") in database.execute("SELECT key, value FROM params").fetchall()
    assert [step for key, step in steps if key == "train/loss"] == [1, 2, 3, 4, 5, 6]
    assert [step for key, step in steps if key == "validation/loss"] == [0, 3, 6]


@pytest.mark.long
def test_wandb_offline(converted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    need("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = interrupted_and_resumed(converted, "wandb")
    runs = list((folder / ".scratch/loggers/wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 2  # one for each process, to be joined by `wandb sync`
    assert len({run.name for run in runs}) == 1  # the run's id


@pytest.mark.long
def test_a_server_that_does_not_answer_ends_the_run_before_it_trains(
    converted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    need("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:pa55word@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    done = stage("finetune_lora", converted("run", train={**TRAIN, "loggers": ["mlflow"]}, convert=ONE_RANK))
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "train.loggers: mlflow does not start: " in line
    assert "pa55word" not in done.stdout + done.stderr
    assert "step 1/" not in done.stdout
