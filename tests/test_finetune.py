"""Training through the real stages: reproducible to the byte, independent of the cut, and stopped by one line."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.stages import digests, metrics, run_stage, set_params, stage

pytestmark = pytest.mark.slow


def test_two_runs_are_byte_identical_and_flatten(trained: Callable[..., Path]) -> None:
    first, second = trained("first"), trained("second")
    adapter = "artifacts/lora_adapter"
    assert digests(first / adapter) == digests(second / adapter)
    assert sorted(digests(first / adapter)) == [
        "SHA256SUMS",
        "adapter_config.json",
        *(f"lora/model/dp_rank_00_tp_rank_0{rank}_pp_rank_00.pt" for rank in range(3)),
    ]
    found = metrics(first, "finetune_lora")
    assert found == metrics(second, "finetune_lora")
    assert found["validation_loss"] < found["base_validation_loss"] - 0.1  # it learns
    for folder in (first, second):
        run_stage("flatten_adapter", folder)
    assert digests(first / "artifacts" / "adapter") == digests(second / "artifacts" / "adapter")
    assert sorted(digests(first / "artifacts" / "adapter")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert metrics(first, "flatten_adapter")["trainer_peft_loss_gap"] < 1e-4


def test_losses_do_not_depend_on_the_cut(trained: Callable[..., Path]) -> None:
    """tp 1, tp 3, tp 6 with every KV head twice, and two data-parallel replicas: the same run. Without dropout,
    whose masks differ between replicas. (tests/test_llama.py has the gradients of every layout.)"""
    lora = {"lora_dropout": 0.0}
    cuts: dict[str, dict[str, Any]] = {
        "tp1": {"convert": {"tp_size": 1}},
        "tp3": {"convert": {"tp_size": 3}},
        "tp6x2": {"convert": {"tp_size": 6, "kv_size_multiplier": 2}},
        "tp1-dp2": {"convert": {"tp_size": 1}, "train": {"dp_size": 2}},
    }
    found = {name: metrics(trained(name, lora=lora, **cut), "finetune_lora") for name, cut in cuts.items()}
    for name, run in found.items():
        for key in ("base_validation_loss", "train_loss", "validation_loss"):
            assert run[key] == pytest.approx(found["tp1"][key], abs=1e-3), (name, key)
        assert run["train_tokens"] == found["tp1"]["train_tokens"]
        assert run["steps"] == found["tp1"]["steps"]


def test_dropout_is_alike_on_tensor_parallel_ranks(trained: Callable[..., Path]) -> None:
    """With a mask of its own on every rank, the copies of lora_A would part and flatten_adapter would refuse them."""
    lora = {"lora_dropout": 0.3}
    one, three = trained("one", lora=lora, convert={"tp_size": 1}), trained("three", lora=lora)
    losses = [metrics(folder, "finetune_lora")["validation_loss"] for folder in (one, three)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    run_stage("flatten_adapter", three)


def test_max_steps_ends_the_schedule_and_is_validated(trained: Callable[..., Path]) -> None:
    found = metrics(trained("short", train={"max_steps": 2}), "finetune_lora")
    assert found["steps"] == 2
    assert found["validation_loss"] != found["base_validation_loss"]


def test_damaged_inputs_end_the_run_with_one_line(trained: Callable[..., Path]) -> None:
    folder = trained("broken", train={"max_steps": 1})
    before = digests(folder / "artifacts" / "lora_adapter")
    for damaged, ranks in (
        ("shards/pretrained_weight/model/dp_rank_00_tp_rank_01_pp_rank_00.pt", "1"),
        ("prepared/train.parquet", "012"),
    ):
        path = folder / "artifacts" / damaged
        whole = path.read_bytes()
        path.write_bytes(whole[:-1000] + bytes([whole[-1000] ^ 1]) + whole[-999:])
        done = stage("finetune_lora", folder)
        path.write_bytes(whole)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert re.match(rf"error: training stopped, rank [{ranks}] failed: artifacts/{damaged} is damaged", line), line
        assert digests(folder / "artifacts" / "lora_adapter") == before  # the last good adapter is untouched


def test_minus_one_steps_are_refused_with_the_reason(prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "minus_one"
    shutil.copytree(prepared, folder, symlinks=True)
    set_params(folder, train={"max_steps": -1})
    done = stage("finetune_lora", folder)
    assert done.returncode == 1
    assert "max_steps: -1 is refused, since a schedule over -1 steps has a learning rate of 0" in done.stderr
