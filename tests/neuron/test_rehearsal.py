"""The trainer on both backends from the same shards: `cpu`, and `nxd` with the real NxD on a stand-in for torch_xla.

docs/trainium.md says what this needs. tests/neuron/test_torch_xla.py has the real torch_xla.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import ROOT
from support.nxd import REHEARSAL, stand_in_environment
from support.rehearsal import (
    QKV,
    Rehearsals,
    assert_bfloat16_run,
    assert_same_run,
    metrics,
    records,
    run_stage,
    write_params,
)

pytestmark = pytest.mark.long

STEPS = 10
CUTS = [("trn2", 1), ("trn2", 2), ("trn1", 1), ("trn1", 2)]  # with multiplier 2, each KV head is on two ranks


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """train(where, hw_backend, multiplier, dp_size, **sections): a folder after 10 steps."""
    stand_in_environment()  # skips the tests without it
    return Rehearsals(tmp_path_factory, STEPS, seq_len=256).train


@pytest.mark.parametrize("targets", [QKV, "all-linear"], ids=str)
@pytest.mark.parametrize(("hw_backend", "multiplier"), CUTS)
def test_ten_steps_equal_the_torch_backend(
    train: Callable[..., Path], hw_backend: str, multiplier: int, targets: list[str] | str
) -> None:
    lora = {"target_modules": targets}
    found = train("nxd", hw_backend, multiplier, lora=lora)
    assert_same_run(found, train("cpu", hw_backend, multiplier, lora=lora), STEPS)
    run_stage("flatten_adapter", found)  # HF + PEFT have the loss that the nxd backend measured


def test_the_best_adapter_is_kept_and_training_stops_early(train: Callable[..., Path]) -> None:
    """The learning rate rises until the training diverges, so that an earlier adapter is the best one."""
    options = {
        "lr": 1.0, "warmup_ratio": 1.0, "validate_every_steps": 1, "keep": "best", "early_stopping_patience": 2
    }  # fmt: skip
    found, expected = (metrics(train(backend, "trn2", 1, train=options)) for backend in ("nxd", "cpu"))
    assert found["stopped_early"]
    assert found["kept_step"] == found["steps"] - 2
    for key in ("kept_step", "steps"):
        assert found[key] == expected[key], key
    assert found["validation_loss"] == pytest.approx(expected["validation_loss"], abs=1e-3)
    run_stage("flatten_adapter", train("nxd", "trn2", 1, train=options))  # HF + PEFT have the loss of the kept adapter


def test_some_of_the_fused_layers_targets(train: Callable[..., Path]) -> None:
    """Of q, k and v, and of gate and up, only some are trained: NxD's layers have the others too."""
    lora = {"target_modules": ["q_proj", "v_proj", "up_proj"], "use_rslora": True}
    assert_same_run(train("nxd", "trn2", 2, lora=lora), train("cpu", "trn2", 2, lora=lora), STEPS)


@pytest.mark.parametrize("targets", [QKV, "all-linear"], ids=str)
def test_sequence_parallelism_and_recomputed_attention_change_nothing(
    train: Callable[..., Path], targets: list[str] | str
) -> None:
    """NxD's own LoRA does not sum the gradients of whole weights over the ranks here: each rank would train its own."""
    both, lora = {"sequence_parallel": True, "selective_checkpointing": True}, {"target_modules": targets}
    found = train("nxd", "trn2", 2, neuron=both, lora=lora)
    assert_same_run(found, train("cpu", "trn2", 2, lora=lora), STEPS)
    plain = train("nxd", "trn2", 2, lora=lora)
    for recomputed, once in zip(records(found), records(plain), strict=True):
        assert recomputed["attentions"] - once["attentions"] == STEPS * 2 * 2  # micro-batches per step, layers


def test_two_replicas_with_dropout(train: Callable[..., Path]) -> None:
    """dp 2 × tp 2, each KV head on both ranks. Both backends draw the same dropout; replicas draw different ones."""
    # On q, k and v only: in the last layer, the torch backend computes what follows them for labelled tokens alone, so
    # that its masks there have another shape.
    dropout = {"lora_dropout": 0.05, "target_modules": QKV}
    assert_same_run(train("nxd", "trn2", 2, 2, lora=dropout), train("cpu", "trn2", 2, 2, lora=dropout), STEPS)


def test_the_profiles_shape(train: Callable[..., Path]) -> None:
    """As in profiles/llama3-8b-trn2-nxd.yaml: replicas, KV head copies, sequence parallelism, recomputation."""
    both = {"sequence_parallel": True, "selective_checkpointing": True}
    lora = {"target_modules": "all-linear"}
    assert_same_run(train("nxd", "trn2", 2, 2, neuron=both, lora=lora), train("cpu", "trn2", 2, 2, lora=lora), STEPS)


@pytest.mark.parametrize("tp_size", [2, 4])
def test_bfloat16(train: Callable[..., Path], tp_size: int) -> None:
    """As the profiles have it; torch, unlike XLA, raises where dtypes are mixed."""
    options = {"ranks": tp_size, "lora": {"target_modules": "all-linear"}}
    both = {"sequence_parallel": True, "selective_checkpointing": True}
    found = train("nxd", "trn2", 1, **options, model={"dtype": "bfloat16"}, neuron=both)
    expected = (train("cpu", "trn2", 1, **options, model={"dtype": dtype}) for dtype in ("bfloat16", "float32"))
    assert_bfloat16_run(found, *expected)


@pytest.mark.parametrize("targets", [QKV, "all-linear"], ids=str)
def test_nxd_loads_the_adapter_that_the_torch_backend_saved(
    train: Callable[..., Path], targets: list[str] | str
) -> None:
    """With NxD's own LoRA layers, which then compute the same logits as ours."""
    env = stand_in_environment() | {"NEURON_PLATFORM_TARGET_OVERRIDE": "trn2"}
    folder = train("cpu", "trn2", 2, lora={"target_modules": targets})
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=4", "--rdzv-backend=c10d"]
    done = subprocess.run(
        [*command, "--rdzv-endpoint=127.0.0.1:0", str(REHEARSAL / "load_adapter.py")],
        cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_shards_of_the_other_hardware_are_refused(train: Callable[..., Path], tmp_path: Path) -> None:
    """NxD takes its KV groups from the hardware it runs on: trn1's shards would train with mixed gradients on trn2."""
    folder = tmp_path / "run"
    shutil.copytree(train("cpu", "trn1", 2, lora={"target_modules": QKV}), folder, symlinks=True)
    write_params(folder, backend="nxd")
    env = stand_in_environment() | {"NEURON_PLATFORM_TARGET_OVERRIDE": "trn2"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "stages/finetune_lora.py")],
        cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "NxD adds KV gradients over the ranks [(0, 1), (2, 3), (4, 5), (6, 7)], equal heads are on" in done.stderr
