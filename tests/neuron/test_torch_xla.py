"""The training stage on `nxd` with NxD's own code and the real torch_xla, on a CPU, compared with `cpu`.

docs/trainium.md says what this needs. Several ranks exchange values over gloo (rehearsal/bridge.py).
"""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import ROOT
from support.hlo import executed_graphs
from support.nxd import XLA_PYTHON, xla_environment
from support.rehearsal import QKV, Rehearsals, adapter, assert_bfloat16_run, assert_same_run, curve, metrics, run_stage

pytestmark = pytest.mark.long

STEPS = 4
TOLERANCE = 3e-4  # XLA adds in another order than torch
BOTH = {"sequence_parallel": True, "selective_checkpointing": True}
ALL_LINEAR = {"target_modules": "all-linear"}


@pytest.fixture(scope="module")
def rehearsals(tmp_path_factory: pytest.TempPathFactory) -> Rehearsals:
    xla_environment()  # skips the tests without it
    return Rehearsals(tmp_path_factory, STEPS, seq_len=128)


@pytest.fixture(scope="module")
def train(rehearsals: Rehearsals) -> Callable[..., Path]:
    """train(where, hw_backend, multiplier, dp_size, ranks=…, **sections): a folder after 4 steps."""
    return rehearsals.train


def test_one_rank(train: Callable[..., Path]) -> None:
    found = train("torch_xla", "trn2", 1, ranks=1, lora=ALL_LINEAR)
    assert_same_run(found, train("cpu", "trn2", 1, ranks=1, lora=ALL_LINEAR), STEPS, TOLERANCE)
    run_stage("flatten_adapter", found)  # HF + PEFT have the loss that torch_xla measured


def test_two_ranks_with_all_that_the_profiles_have(train: Callable[..., Path]) -> None:
    """Sequence parallelism, recomputed attention, two copies of a KV head; a checkpoint after each step."""
    often = {"checkpoint_every_steps": 1}
    found = train("torch_xla", "trn2", 2, ranks=2, neuron=BOTH, lora=ALL_LINEAR, train=often)
    expected = train("cpu", "trn2", 2, ranks=2, lora=ALL_LINEAR, train=often)
    assert_same_run(found, expected, STEPS, TOLERANCE)
    first, second = adapter(found)
    assert first["model.layers.0.self_attn.qkv_proj.lora_A.weight"].equal(
        second["model.layers.0.self_attn.qkv_proj.lora_A.weight"]
    )
    run_stage("flatten_adapter", found)


def test_two_replicas(train: Callable[..., Path]) -> None:
    found = train("torch_xla", "trn2", 1, 2, ranks=2, lora={"target_modules": QKV})
    assert_same_run(found, train("cpu", "trn2", 1, 2, ranks=2, lora={"target_modules": QKV}), STEPS, TOLERANCE)


@pytest.mark.parametrize("ranks", [1, 2])
def test_bfloat16(train: Callable[..., Path], ranks: int) -> None:
    options: dict[str, Any] = {"ranks": ranks, "lora": ALL_LINEAR}
    found = train("torch_xla", "trn2", 1, **options, model={"dtype": "bfloat16"}, neuron=BOTH if ranks > 1 else {})
    expected = (train("cpu", "trn2", 1, **options, model={"dtype": dtype}) for dtype in ("bfloat16", "float32"))
    assert_bfloat16_run(found, *expected)


# The stage as a user starts it ----------------------------------------------------------------------------------------

# Two micro-batches per step; two epochs, of which max_steps ends the second early. Dropout draws other numbers for each
# micro-batch.
WHOLE = {"global_batch_size": 16, "micro_batch_size": 8, "epochs": 2, "max_steps": 9, "checkpoint_every_steps": 2}


def new_folder(rehearsals: Rehearsals) -> Path:
    lora = {**ALL_LINEAR, "lora_dropout": 0.05}
    return rehearsals.converted("torch_xla", "trn2", 1, ranks=1, lora=lora, train=WHOLE)


COMMAND = [str(XLA_PYTHON), str(ROOT / "stages/finetune_lora.py")]


def stage_environment(**more: str) -> dict[str, str]:
    return xla_environment() | {"NEURON_PLATFORM_TARGET_OVERRIDE": "trn2"} | more


@pytest.fixture(scope="module")
def whole_run(rehearsals: Rehearsals) -> Path:
    """A folder after a run, with the graphs that it executed in graphs.0."""
    folder = new_folder(rehearsals)
    save = {"XLA_SAVE_TENSORS_FILE": str(folder / "graphs"), "XLA_SAVE_TENSORS_FMT": "hlo"}
    run = subprocess.run(
        COMMAND, cwd=folder, env=stage_environment(**save), capture_output=True, text=True, timeout=900, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


def test_three_large_graphs_and_nothing_new_after_the_third_step(whole_run: Path) -> None:
    """A validation batch, the first micro-batch of a step, and the others, which add their gradients."""
    graphs = executed_graphs(whole_run / "graphs.0")
    steps, per_epoch = metrics(whole_run)["steps"], metrics(whole_run)["steps_per_epoch"]
    assert steps == WHOLE["max_steps"]
    assert per_epoch < steps < 2 * per_epoch  # ends inside an epoch
    large = [(graph, dots) for graph, dots in graphs if dots]
    order = list(dict.fromkeys(large))
    assert len(order) == 3
    validation, first, adding = order
    print(f"\nproducts in a validation batch {validation[1]}, in a micro-batch {first[1]}")
    assert first[1] == adding[1] > 2 * validation[1]
    train = [graph for graph in large if graph != validation]
    assert train == [first, adding] * steps  # one execution per micro-batch
    third = [place for place, graph in enumerate(graphs) if graph == first][3]  # where the fourth step begins
    assert {graph for graph, _ in graphs[third:]} <= {graph for graph, _ in graphs[:third]}


def test_a_killed_run_resumes_with_the_same_bytes(rehearsals: Rehearsals, whole_run: Path) -> None:
    folder = new_folder(rehearsals)
    log = folder / "log"
    with log.open("w") as output:
        run = subprocess.Popen(
            COMMAND, cwd=folder, env=stage_environment(), stdout=output, stderr=output, start_new_session=True
        )
        while "step 5/" not in log.read_text("utf-8"):
            assert run.poll() is None, log.read_text("utf-8")
            time.sleep(0.1)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    assert not (folder / "artifacts/lora_adapter").exists()
    again = subprocess.run(
        COMMAND, cwd=folder, env=stage_environment(), capture_output=True, text=True, timeout=900, check=False
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert re.search(r"resuming from step [4-8] of 9", again.stdout)  # a step takes as long as the poll above
    for name in ("loss", "grad_norm", "lr"):
        assert curve(folder, name) == curve(whole_run, name)
    for shard, expected in zip(adapter(folder), adapter(whole_run), strict=True):
        assert all(shard[name].equal(tensor) for name, tensor in expected.items())
    assert metrics(folder) == metrics(whole_run)


def test_ranks_that_torch_xla_does_not_see_are_refused(rehearsals: Rehearsals) -> None:
    """Its collectives would return their input: each rank would train an adapter of its own."""
    folder = rehearsals.converted("torch_xla", "trn2", 1, ranks=2)
    run = subprocess.run(
        COMMAND, cwd=folder, env=stage_environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 1
    assert "torch_xla sees 1 of the 2 ranks: set neuron.python" in run.stderr
