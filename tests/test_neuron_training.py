"""Backend neuron with the real stage and a stand-in for torch_neuronx: the run of cpu, and one graph of each kind.

The stand-in (tests/neuron/native) has the names of torch_neuronx; the graphs are torch.compile's.
"""

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from support.nxd import REHEARSAL
from support.rehearsal import Rehearsals, assert_same_run, curve, environment

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("neuron_training")]

CUT = "trn2", 1, 2  # two replicas of two ranks
# Two epochs with a validation after each, three micro-batches a step and replica, the last of an epoch not full.
RUN: dict[str, Any] = {
    "lora": {"lora_dropout": 0.05, "target_modules": "all-linear"},
    "train": {"epochs": 2, "max_steps": None, "global_batch_size": 6, "checkpoint_every_steps": 2},
}
# The embedding; a layer, the norm and the loss of a chunk in validations, and in training, there with backward graphs
# of the first two; the sum of gradients over ranks and over replicas; the gradients' norm; clipping; AdamW.
GRAPHS = 1 + 3 + 3 + 2 + 2 + 3


@pytest.fixture(scope="module")
def rehearsals(tmp_path_factory: pytest.TempPathFactory) -> Rehearsals:
    return Rehearsals(tmp_path_factory, steps=0, seq_len=256)


@pytest.fixture(scope="module")
def on_cpu(rehearsals: Rehearsals) -> Path:
    return rehearsals.train("cpu", *CUT, **RUN)


def graphs(folder: Path) -> list[list[str]]:
    """For each rank, a line for each graph that it compiled."""
    return [file.read_text().splitlines() for file in sorted((folder / "graphs").iterdir())]


def test_a_whole_run_equals_cpu_and_compiles_each_kind_of_graph_once(rehearsals: Rehearsals, on_cpu: Path) -> None:
    found = rehearsals.train("neuron", *CUT, **RUN)
    steps = len(curve(on_cpu, "loss"))
    assert steps > 2
    assert_same_run(found, on_cpu, steps)
    ranks = graphs(found)
    assert len(ranks) == 4
    assert [len(lines) for lines in ranks] == [GRAPHS] * 4, ranks


def test_a_checkpoint_of_cpu_resumes_on_neuron(rehearsals: Rehearsals, on_cpu: Path) -> None:
    folder = rehearsals.converted("cpu", *CUT, **RUN)
    env, launcher = environment("cpu", "trn2", 4, folder)
    (folder / "record").mkdir()
    process = subprocess.Popen([*launcher, str(REHEARSAL / "record.py")], cwd=folder, env=env)
    while not list(folder.glob(".scratch/checkpoints/*/*/step_00000002/SHA256SUMS")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    (saved,) = folder.glob(".scratch/checkpoints/*/*")
