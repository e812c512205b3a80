"""Training on several nodes: the hosts are network namespaces of this machine, each with its own folder.

The tests with hosts check the numbers, not the speed: all hosts share this machine's cores.
"""

import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import ROOT
from support.stages import digests, metrics, run_stage, set_params
from test_resume import checkpoints, curve

from trnlora.errors import UserError
from trnlora.training.cluster import Nodes, from_environment, processes_per_node, srun_command

TRAIN = {"epochs": 1, "lr": 1.0e-3, "global_batch_size": 4, "checkpoint_every_steps": 3}


@pytest.fixture(autouse=True)
def no_rendezvous(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "PET_"))]:
        monkeypatch.delenv(name)


def test_one_node_without_environment_variables() -> None:
    assert from_environment() == Nodes(1, 0, "127.0.0.1", 0)
    assert srun_command(["python"]) is None


def test_variables_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PET_NNODES": "4", "PET_NODE_RANK": "3", "PET_MASTER_ADDR": "10.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    assert from_environment() == Nodes(4, 3, "10.0.0.1", 29500)
    monkeypatch.setenv("PET_NODE_RANK", "4")
    with pytest.raises(UserError, match="this is node 4 of 4: number the nodes from 0"):
        from_environment()
    monkeypatch.delenv("PET_NODE_RANK")
    with pytest.raises(UserError, match="PET_NODE_RANK in the environment must be a number"):
        from_environment()


def test_variables_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As set by sbatch in the batch script and by srun in each task (see the manual pages of both)."""
    job = {
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NUM_NODES": "4",
        "SLURM_JOB_NODELIST": "trn[05-08]",
        "SLURM_NODEID": "0",
    }
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    command = srun_command(["python", "stage.py"])
    assert command is not None
    assert command[:2] == ["srun", "--nodes=4"]
    assert command[-2:] == ["python", "stage.py"]
    step = {"SLURM_STEP_NUM_NODES": "4", "SLURM_STEP_NODELIST": "trn[05-08]", "SLURM_NODEID": "2"}
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    assert srun_command(["python", "stage.py"]) is None
    assert from_environment() == Nodes(4, 2, "trn05", 24567)


def test_a_replica_is_not_split_over_nodes() -> None:
    assert processes_per_node(2, tp_size=32, dp_size=4) == 64
    with pytest.raises(UserError, match=r"dp_size 3 replicas do not spread over 2 nodes"):
        processes_per_node(2, tp_size=4, dp_size=3)


class Host:
    """A network namespace with one interface, connected to a bridge of the machine."""

    def __init__(self, name: str, address: str):
        self.name = name
        self.address = address

    def start(self, folder: Path, *command: str, **env: str) -> "psutil.Popen":
        """Start a command on the host, in `folder`."""
        return psutil.Popen(
            ["ip", "netns", "exec", self.name, *command],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def cut_off(self) -> None:
        """Disconnect its network: packets to it are lost, without any error to the sender."""
        subprocess.run(["ip", "link", "set", f"{self.name}v", "down"], check=True)


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Four hosts in a separate network."""
    run = uuid.uuid4().hex[:6]
    bridge, made = f"br{run}", [Host(f"h{run}{number}", f"10.213.7.{number + 1}") for number in range(4)]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)

    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("link", "set", bridge, "up")
        for host in made:
            ip("netns", "add", host.name)
            ip("link", "add", f"{host.name}v", "type", "veth", "peer", "name", "eth0", "netns", host.name)
            ip("link", "set", f"{host.name}v", "master", bridge, "up")
            for arguments in (
                ("addr", "add", f"{host.address}/24", "dev", "eth0"),
                ("link", "set", "eth0", "up"),
                ("link", "set", "lo", "up"),
            ):
                ip("-n", host.name, *arguments)
        yield made
    except FileNotFoundError:
        pytest.skip("no `ip` here: apt-get install iproute2")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here ({error.stderr.strip()}): use root, not an unprivileged container")
    finally:
        if shutil.which("ip"):
            for host in made:
                subprocess.run(["ip", "netns", "delete", host.name], check=False, capture_output=True)
            subprocess.run(["ip", "link", "delete", bridge], check=False, capture_output=True)


@pytest.fixture
def job(prepared: Path, tmp_path: Path) -> Callable[..., list[Path]]:
    """job(name, nodes, **sections): one folder per node, each with the model, rows and shards."""

    def make(name: str, nodes: int, **sections: dict[str, Any]) -> list[Path]:
        first = tmp_path / name / "0"
        shutil.copytree(prepared, first, symlinks=True)
        set_params(first, **sections)
        run_stage("convert_nxd", first)
        folders = [first, *(tmp_path / name / str(number) for number in range(1, nodes))]
        for folder in folders[1:]:
            shutil.copytree(first, folder, symlinks=True)
        return folders

    return make


def stage_everywhere(hosts: list[Host], folders: list[Path]) -> list["psutil.Popen"]:
    """Start finetune_lora on each host, with torchrun's variables."""
    return [
        host.start(
            folder, sys.executable, str(ROOT / "stages/finetune_lora.py"),
            PET_NNODES=str(len(folders)), PET_NODE_RANK=str(number), PET_MASTER_ADDR=hosts[0].address,
        )
        for number, (host, folder) in enumerate(zip(hosts, folders, strict=False))
    ]  # fmt: skip


def torchrun_everywhere(hosts: list[Host], folders: list[Path], processes: int) -> list["psutil.Popen"]:
    """Start it with torchrun and a c10d rendezvous. is_host is needed because these hosts share the machine's name."""
    return [
        host.start(
            folder, sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(folders)}",
            f"--nproc-per-node={processes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={hosts[0].address}:29400",
            f"--rdzv-conf=is_host={int(host is hosts[0])}", "--rdzv-id=test", f"--local-addr={host.address}",
            str(ROOT / "stages/finetune_lora.py"),
        )
        for host, folder in zip(hosts, folders, strict=False)
    ]  # fmt: skip


def ended(runs: list["psutil.Popen"]) -> list[str]:
    printed = [run.communicate(timeout=180)[0] for run in runs]
    assert all(run.returncode == 0 for run in runs), "\n".join(printed)
    return printed


def assert_same_losses(one: Path, other: Path) -> None:
    for name in ("train/loss", "validation/loss"):
        expected, found = curve(one, name), curve(other, name)
        assert [row["step"] for row in expected] == [row["step"] for row in found]
        for left, right in zip(expected, found, strict=True):
            column = name.split("/")[1]
            assert float(left[column]) == pytest.approx(float(right[column]), abs=1e-5), (name, left["step"])
    assert metrics(one, "finetune_lora")["train_tokens"] == metrics(other, "finetune_lora")["train_tokens"]


@pytest.mark.long
def test_hosts_train_as_one(hosts: list[Host], job: Callable[..., list[Path]]) -> None:
    """Two hosts with tp 3 and four with tp 1 have the losses of one process to 1e-5, with dropout."""
    (single,) = job("single", 1, convert={"tp_size": 1}, train=TRAIN)
    run_stage("finetune_lora", single)

    two = job("two", 2, convert={"tp_size": 3}, train={**TRAIN, "dp_size": 2})
    ended(stage_everywhere(hosts, two))
    assert_same_losses(single, two[0])
    # Only the first node has written outputs.
    assert digests(two[0] / "artifacts/lora_adapter")
    for name in ("artifacts/lora_adapter", "metrics/finetune_lora.json", "plots", ".scratch"):
        assert not (two[1] / name).exists(), name

    four = job("four", 4, convert={"tp_size": 1}, train={**TRAIN, "dp_size": 4})
    ended(torchrun_everywhere(hosts, four, processes=1))
    assert_same_losses(single, four[0])


@pytest.mark.long  # 40 s without an answer
def test_losing_a_host_ends_the_run_and_a_rerun_resumes(hosts: list[Host], job: Callable[..., list[Path]]) -> None:
    """One of two hosts loses its network. A rerun on the other resumes and ends with the losses of a whole run."""
    sections: dict[str, Any] = {"convert": {"tp_size": 1}, "train": {**TRAIN, "epochs": 2}}
    (single,) = job("single", 1, **sections)
    run_stage("finetune_lora", single)

    sections["train"]["dp_size"] = 2
    folders = job("cut", 2, **sections)
    runs = stage_everywhere(hosts, folders)
    while not any(step >= 6 for step in checkpoints(folders[0])):
        assert runs[0].poll() is None, runs[0].stdout.read()
        time.sleep(0.05)
    hosts[1].cut_off()
    printed = [run.communicate(timeout=90)[0] for run in runs]
    assert [run.returncode for run in runs] == [1, 1]
    for own, other in ((0, 1), (1, 0)):
        assert "Traceback" not in printed[own]
        (line,) = [line for line in printed[own].splitlines() if "error: " in line]
        assert f"no answer from node {hosts[other].address}" in line
    assert not (folders[0] / "artifacts/lora_adapter").exists()

    set_params(folders[0], train={"dp_size": 1})
    printed = ended(stage_everywhere(hosts, folders[:1]))
    assert "resuming from step" in printed[0]
    assert "that checkpoint was made with 2 replicas" in printed[0]
    assert_same_losses(single, folders[0])


@pytest.mark.slow
def test_nodes_with_different_inputs_are_refused(hosts: list[Host], job: Callable[..., list[Path]]) -> None:
    folders = job("job", 2, convert={"tp_size": 1}, train={**TRAIN, "dp_size": 2})
    set_params(folders[1], train={"lr": 2.0e-3})
    runs = stage_everywhere(hosts, folders)
    printed = [run.communicate(timeout=120)[0] for run in runs]
    for run, output in zip(runs, printed, strict=True):
        assert run.returncode == 1
        assert f"params.yaml on node {hosts[1].address} differs from that on the first node" in output
