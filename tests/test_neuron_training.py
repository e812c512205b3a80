"""Backend neuron with the real stage and a stand-in for torch_neuronx: the run of cpu, and one graph of each kind.

The stand-in (tests/neuron/native) has the names of torch_neuronx; the graphs are torch.compile's.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support import ROOT
from support.nxd import REHEARSAL
from support.rehearsal import (
    NATIVE,
    Rehearsals,
    adapter,
    assert_bfloat16_run,
    assert_same_run,
    curve,
    environment,
    run_script,
    write_params,
)

from trnlora.files import write_json, write_sums
from trnlora.training import checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("neuron_training")]

# Two epochs with a validation after each, three micro-batches a step and replica, the last of an epoch not full.
RUN: dict[str, Any] = {
    "lora": {"lora_dropout": 0.05, "target_modules": "all-linear"},
    "train": {"epochs": 2, "max_steps": None, "global_batch_size": 6, "checkpoint_every_steps": 2},
}
# The embedding; a layer, the norm and the loss of a chunk in validations, and in training, there with backward graphs
# of the first two; the gradients' norm; clipping; AdamW. With several ranks also the sum of gradients over them, with
# several replicas that over replicas.
GRAPHS = 1 + 3 + 3 + 2 + 3


@pytest.fixture(scope="module")
def rehearsals(tmp_path_factory: pytest.TempPathFactory) -> Rehearsals:
    return Rehearsals(tmp_path_factory, steps=0, seq_len=256)


def graphs(folder: Path) -> list[list[str]]:
    """For each rank, a line for each graph that it compiled."""
    return [file.read_text().splitlines() for file in sorted((folder / "graphs").iterdir())]


def test_the_names_of_device_groups_and_compiler_are_the_documented_ones() -> None:
    """In a process of its own: a device's name is registered once."""
    code = (
        "import torch; from trnlora.backends import neuron_training as native; "
        "from trnlora.profiles import load_profile; "
        "placement = native.trainer_placement(load_profile('llama3-8b-trn2-3xl')); "
        "assert placement['accelerator'].get_parallel_devices(2) == [torch.device('neuron')] * 2; "
        "assert placement['strategy'].process_group_backend == 'neuron'; "
        "assert torch.compile(lambda x: x + 1, backend=native.NEURON)(torch.ones(2)).tolist() == [2, 2]"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(NATIVE)]), "RANK": "0"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True)


@pytest.mark.parametrize("replicas", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_whole_run_equals_cpu_and_compiles_each_kind_of_graph_once(rehearsals: Rehearsals, replicas: int) -> None:
    """Of two ranks."""
    cut: Any = {"hw_backend": "trn2", "multiplier": 1, "dp_size": replicas, "ranks": 2 * replicas}
    on_cpu, found = (rehearsals.train(where, **cut, **RUN) for where in ("cpu", "neuron"))
    steps = len(curve(on_cpu, "loss"))
    assert steps > 2
    assert_same_run(found, on_cpu, steps)
    ranks = graphs(found)
    assert [len(lines) for lines in ranks] == [GRAPHS + replicas] * 2 * replicas, ranks


@pytest.mark.long
def test_a_checkpoint_of_cpu_resumes_on_neuron(rehearsals: Rehearsals) -> None:
    """Only on request, since its last digits are another backend's. Each kind of graph is compiled once here too."""
    one_rank: Any = {"ranks": 1, "lora": RUN["lora"], "train": {**RUN["train"], "epochs": 1}}
    on_cpu = rehearsals.train("cpu", "trn2", 1, **one_rank)
    folder = rehearsals.converted("cpu", "trn2", 1, **one_rank)
    for name in ("record", "graphs"):
        (folder / name).mkdir()
    env, launcher = environment("cpu", "trn2", 1, folder)
    process = subprocess.Popen([*launcher, str(REHEARSAL / "record.py")], cwd=folder, env=env)
    while not list(folder.glob(".scratch/checkpoints/*/*/step_00000002/SHA256SUMS")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    checkpoint = max(folder.glob(".scratch/checkpoints/*/*/*"))

    write_params(folder, backend="neuron")
    env, launcher = environment("neuron", "trn2", 1, folder)
    run_script(REHEARSAL / "record.py", folder, env, launcher, "--resume-from", str(checkpoint.relative_to(folder)))
    assert len(curve(folder, "loss")) == len(curve(on_cpu, "loss"))
    for name in ("loss", "grad_norm", "lr"):
        assert curve(folder, name) == pytest.approx(curve(on_cpu, name), abs=2e-5, rel=1e-5), name
    for one, other in zip(adapter(folder), adapter(on_cpu), strict=True):
        assert all((tensor - other[name]).abs().max() < 1e-5 for name, tensor in one.items())
    assert [len(lines) for lines in graphs(folder)] == [GRAPHS]


def test_a_checkpoint_of_another_backend_is_named_and_not_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = checkpoints.numeric_code("neuron")
    saved = tmp_path / "of_cpu/step_00000002"
    saved.mkdir(parents=True)
    write_json(saved / checkpoints.RUN, {"code": ours | {"backend": "cpu"}})
    write_sums(saved)
    assert checkpoints.find(tmp_path / "of_neuron", None, ours) is None
    assert f"not resuming: the checkpoints of this run in {saved.parent} are by other code (backend)" in (
        capsys.readouterr().out
    )


@pytest.mark.long
def test_bfloat16_weights_stay_near_float32(rehearsals: Rehearsals) -> None:
    """Over 50 steps; the adapter is float32. On cpu, bfloat16 differs from float32 by 0.09 in a step's loss."""
    train = {"max_steps": 50, "epochs": 9}
    runs = [
        rehearsals.train(where, "trn2", 1, ranks=1, model={"dtype": dtype}, train=train)
        for where, dtype in (("neuron", "bfloat16"), ("cpu", "bfloat16"), ("cpu", "float32"))
    ]
    assert len(curve(runs[0], "loss")) == 50
    assert_bfloat16_run(*runs, bounds=(0.15, 0.15))
