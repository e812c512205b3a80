"""Training with the real stages: reproducible bytes, the same losses for every sharding, errors of one line."""

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.runs import STOPS_EARLY, TRAIN
from support.stages import digests, metrics, run_stage, set_params, stage

from trnlora.data.templates import load_template
from trnlora.files import sha256
from trnlora.training.adapter_record import read_record

pytestmark = pytest.mark.slow

ADAPTER = "artifacts/lora_adapter"
ONE_RANK = {"tp_size": 1}


def test_two_runs_are_byte_identical_and_flatten(trained: Callable[..., Path], converted: Callable[..., Path]) -> None:
    first, second = trained("first", train=TRAIN), converted("second", train=TRAIN)
    run_stage("finetune_lora", second)
    assert digests(first / ADAPTER) == digests(second / ADAPTER)
    assert sorted(digests(first / ADAPTER)) == [
        "SHA256SUMS",
        "adapter_config.json",
        *(f"lora/model/dp_rank_00_tp_rank_0{rank}_pp_rank_00.pt" for rank in range(3)),
        "training.json",
    ]
    found = metrics(first, "finetune_lora")
    assert found == metrics(second, "finetune_lora")
    assert found["validation_loss"] < found["base_validation_loss"] - 0.1  # it learns
    set_params(second, data={"prompt_template": "alpaca"})  # since the training: it does not change what is recorded
    for folder in (first, second):
        run_stage("flatten_adapter", folder)
    assert digests(first / "artifacts" / "adapter") == digests(second / "artifacts" / "adapter")
    assert sorted(digests(first / "artifacts" / "adapter")) == [
        "adapter_config.json", "adapter_model.safetensors", "trnlora.json"
    ]  # fmt: skip
    recorded = read_record(second / "artifacts/adapter")
    assert recorded
    assert recorded.template.model_dump() == load_template("dolly", {}, None).model_dump()
    assert recorded.params["data"]["prompt_template"] == "dolly"
    assert recorded.params["train"]["lr"] == 1.0e-2
    assert recorded.data.files[0].sha256 == sha256(second / "rows.jsonl")
    assert "  trnlora.json\n" in (second / "artifacts/adapter.SHA256SUMS").read_text("utf-8")
    assert metrics(first, "flatten_adapter")["trainer_peft_loss_gap"] < 1e-4


@pytest.mark.long
@pytest.mark.parametrize(
    "sharding",
    [
        pytest.param({"convert": ONE_RANK, "train": {"dp_size": 2}}, id="tp1-dp2"),
        # Two copies of every KV head. tests/test_decoder.py checks the gradients for every sharding.
        pytest.param({"convert": {"tp_size": 6, "kv_size_multiplier": 2}}, id="tp6x2"),
    ],
)
def test_losses_do_not_depend_on_the_sharding(trained: Callable[..., Path], sharding: dict[str, Any]) -> None:
    """With dropout. tests/test_all_linear.py has tp 1, 2 and 4."""
    one = metrics(trained("one", convert=ONE_RANK), "finetune_lora")
    several = metrics(trained("several", **sharding), "finetune_lora")
    for key in ("base_validation_loss", "train_loss", "validation_loss"):
        assert several[key] == pytest.approx(one[key], abs=1e-3), key
    assert several["train_tokens"] == one["train_tokens"]
    assert several["steps"] == one["steps"]


def test_max_steps_ends_the_schedule_and_is_validated(trained: Callable[..., Path]) -> None:
    found = metrics(trained("short", train={"max_steps": 2}, convert=ONE_RANK), "finetune_lora")
    assert found["steps"] == 2
    assert found["validation_loss"] != found["base_validation_loss"]


def test_the_best_adapter_is_written_with_its_loss(trained: Callable[..., Path]) -> None:
    """HF + PEFT measure it too. Which one is the best, and when training ends, do not depend on the sharding."""
    several = trained("several", **STOPS_EARLY)
    found = metrics(several, "finetune_lora")
    with (several / "plots/training/plots/metrics/validation/loss.tsv").open() as file:
        losses = {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file, delimiter="\t")}
    assert found["kept_step"] < found["steps"]
    assert found["validation_loss"] == losses[found["kept_step"]] == min(losses.values())
    run_stage("flatten_adapter", several)
    assert metrics(several, "flatten_adapter")["trainer_peft_loss_gap"] < 1e-4
    assert losses[found["steps"]] > found["validation_loss"] + 1  # another adapter would not pass

    train = {**STOPS_EARLY["train"], "dp_size": 2}
    replicas = metrics(trained("replicas", lora=STOPS_EARLY["lora"], train=train, convert=ONE_RANK), "finetune_lora")
    for key in ("kept_step", "steps", "stopped_early", "train_tokens"):
        assert replicas[key] == found[key], key
    assert replicas["validation_loss"] == pytest.approx(found["validation_loss"], abs=1e-3)


def test_damaged_inputs_end_the_run_with_one_line(trained: Callable[..., Path]) -> None:
    folder = trained("broken", train=TRAIN)
    before = digests(folder / ADAPTER)
    for damaged, ranks in (
        ("shards/pretrained_weight/model/dp_rank_00_tp_rank_01_pp_rank_00.pt", "1"),
        ("prepared/train.parquet", "012"),
    ):
        path = folder / "artifacts" / damaged
        content = path.read_bytes()
        path.write_bytes(content[:-1000] + bytes([content[-1000] ^ 1]) + content[-999:])
        done = stage("finetune_lora", folder)
        path.write_bytes(content)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert re.match(rf"error: training stopped, rank [{ranks}] failed: artifacts/{damaged} is damaged", line), line
        assert digests(folder / ADAPTER) == before  # the last good adapter is untouched


def test_minus_one_steps_are_refused_with_the_reason(converted: Callable[..., Path]) -> None:
    folder = converted("minus_one")
    set_params(folder, train={"max_steps": -1})
    done = stage("finetune_lora", folder)
    assert done.returncode == 1
    assert "max_steps: -1 is refused, since a schedule over -1 steps has a learning rate of 0" in done.stderr
