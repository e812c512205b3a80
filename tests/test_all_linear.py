"""LoRA on all linear layers with the real stages: the losses of HF + PEFT for every cut, and further training."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from support.models import write_model
from support.runs import Runs, prepare
from support.stages import metrics, run_stage
from transformers import AutoModelForCausalLM

from trnlora.model.config import ModelConfig
from trnlora.model.targets import TARGETS, adapter_tensors
from trnlora.params import load_params
from trnlora.training.batches import epoch_order, read_packed_rows
from trnlora.training.initial_adapter import random_lora_a
from trnlora.training.schedule import learning_rate_factor

pytestmark = pytest.mark.slow

STEPS = 20
LORA: dict[str, Any] = {"target_modules": "all-linear", "share_a": True, "lora_dropout": 0.0}
TRAIN = {"max_steps": STEPS, "epochs": 3, "lr": 3.0e-4, "global_batch_size": 2}
# Of a model with 8 heads and 4 KV heads. The last two have copies of KV heads on several ranks.
CUTS = [
    pytest.param((2, 1, "trn2"), marks=pytest.mark.long),
    (4, 1, "trn2"),
    pytest.param((8, 2, "trn2"), marks=pytest.mark.long),
    pytest.param((8, 2, "trn1"), marks=pytest.mark.long),
]


@pytest.fixture(scope="module")
def eight_heads(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    # Weights of a usual size: with those of the other tests, a step is so steep that rounding errors grow.
    sizes = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "initializer_range": 0.06}
    model = write_model(tmp_path_factory.mktemp("model") / "eight_heads", "llama", **sizes)
    return Runs(prepare(tmp_path_factory.mktemp("prepared"), model), tmp_path_factory.mktemp("eight_heads"))


@pytest.fixture
def train(eight_heads: Runs, tmp_path: Path) -> Callable[..., Path]:
    """train(name, tp_size, kv_size_multiplier, hw_backend, **lora): a folder after 20 steps."""

    def run(name: str, tp_size: int = 1, kv_size_multiplier: int = 1, hw_backend: str = "trn2", **lora: Any) -> Path:
        cut = {"tp_size": tp_size, "kv_size_multiplier": kv_size_multiplier, "hw_backend": hw_backend}
        return eight_heads.trained(tmp_path / name, convert=cut, lora={**LORA, **lora}, train=TRAIN)

    return run


def curve(folder: Path, name: str) -> list[float]:
    with (folder / f"plots/training/plots/metrics/train/{name}.tsv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file, delimiter="\t")]


def assert_same_curves(found: Path, expected: Path) -> None:
    assert len(curve(found, "loss")) == STEPS
    assert curve(found, "loss") == pytest.approx(curve(expected, "loss"), rel=1e-5)
    # A value that several ranks hold counts once.
    assert curve(found, "grad_norm") == pytest.approx(curve(expected, "grad_norm"), rel=1e-4)


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: f"{cut[2]}-tp{cut[0]}x{cut[1]}")
def test_losses_do_not_depend_on_the_cut(train: Callable[..., Path], cut: tuple[int, int, str]) -> None:
    """With dropout: a row-parallel layer's inputs are cut, and its masks are parts of one mask of all inputs.

    Without it for trn1 and copies of KV heads: o_proj's inputs are in another order there, and so are its masks.
    """
    dropout = 0.0 if cut[2] == "trn1" else 0.1
    several = train("several", *cut, lora_dropout=dropout)
    assert_same_curves(several, train("one", lora_dropout=dropout))
    run_stage("flatten_adapter", several)
    assert metrics(several, "flatten_adapter")["trainer_peft_loss_gap"] < 1e-4


def test_separate_a_trains_as_hf_and_peft(train: Callable[..., Path]) -> None:
    """The loss of each of 20 steps, and the adapter after them."""
    folder = train("separate", 2, share_a=False)
    losses, adapter = train_with_peft(folder)
    assert curve(folder, "loss") == pytest.approx(losses, rel=1e-5)
    run_stage("flatten_adapter", folder)
    found = load_file(folder / "artifacts/adapter/adapter_model.safetensors")
    assert found.keys() == adapter.keys()
    for name, tensor in adapter.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=0)


def train_with_peft(folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses and the adapter of the run of `folder`, trained with HF + PEFT, a document at a time."""
    params = load_params(folder / "params.yaml")
    lora, train, model = params.lora, params.train, folder / "artifacts/model"
    config = LoraConfig(r=lora.r, lora_alpha=lora.lora_alpha, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    weights = {name.replace(".default", ""): p for name, p in peft.named_parameters() if p.requires_grad}
    for tensor, values in random_lora_a(adapter_tensors(ModelConfig.from_folder(model), lora), train.seed):
        (key,) = tensor.peft_keys
        weights[key].data.copy_(values)
    optimizer = torch.optim.AdamW(weights.values(), lr=train.lr, weight_decay=train.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(train, step, STEPS))
    rows = read_packed_rows(folder / "artifacts/prepared/train.parquet")
    losses: list[float] = []
    for epoch in range(train.epochs):
        for batch in epoch_order(len(rows["labels"]), epoch, train.seed).split(train.global_batch_size):
            nats, labelled = torch.zeros(()), 0
            for row in batch.tolist():
                documents = rows["document_ids"][row]
                for document in range(1, int(documents.max()) + 1):
                    ids, labels = (rows[name][row][documents == document] for name in ("input_ids", "labels"))
                    logits = peft(ids[None]).logits[0, :-1]
                    nats = nats + F.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")
                    labelled += int((labels[1:] != -100).sum())
            loss = nats / labelled
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights.values(), train.max_grad_norm)
            optimizer.step()
            schedule.step()
            if len(losses) == STEPS:
                return losses, {name: p.detach() for name, p in weights.items()}
    raise AssertionError("too few rows for the steps")


@pytest.mark.long
def test_training_goes_on_from_a_peft_adapter(train: Callable[..., Path], eight_heads: Runs, tmp_path: Path) -> None:
    """With a learning rate near zero, the loss stays the adapter's. The base model's is still measured."""
    first = train("first", 2, share_a=False)  # also of the test above
    run_stage("flatten_adapter", first)
    lora = {**LORA, "share_a": False, "init_adapter": f"path://{first}/artifacts/adapter"}
    once = {**TRAIN, "lr": 1.0e-12, "max_steps": 1}
    further = eight_heads.converted(tmp_path / "further", convert={"tp_size": 4}, lora=lora, train=once)
    run_stage("finetune_lora", further)
    before, after = metrics(first, "finetune_lora"), metrics(further, "finetune_lora")
    assert after["validation_loss"] == pytest.approx(before["validation_loss"], rel=1e-5)
    assert after["base_validation_loss"] == pytest.approx(before["base_validation_loss"], rel=1e-5)
    assert before["validation_loss"] < before["base_validation_loss"] - 0.05
