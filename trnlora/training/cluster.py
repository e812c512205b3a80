"""Several machines in one training: where its ranks are started, how they find each other, and how a lost one is told.

The launcher reads the rendezvous from the environment, under the names of those who set them:

    RANK, WORLD_SIZE, …                                          torchrun has started this process as a rank
    PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR, PET_MASTER_PORT  torchrun's own names for its flags (--nnodes, …)
    SLURM_JOB_NUM_NODES …                                        a SLURM job; SLURM_STEP_…: inside its `srun`
    nothing of these                                             one node

Ranks of one tensor-parallel replica stay on one node. The first replica, on the first node, writes all that is kept;
so nodes may share a folder or each have their own with the same inputs.
"""

import contextlib
import dataclasses
import json
import os
import re
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from trnlora.errors import UserError

START_SECONDS = 1800  # in which all nodes must come
SILENCE_SECONDS = 40  # without an answer of another node, once training runs
DEFAULT_PORT = 29500  # torchrun's


@dataclasses.dataclass(frozen=True)
class Nodes:
    """How many nodes there are, which one this is (from 0), and where all meet: an address of the first."""

    count: int = 1
    rank: int = 0
    address: str = "127.0.0.1"
    port: int = 0


ONE_NODE = Nodes()


def from_environment() -> Nodes:
    """The nodes of this run, for its launcher. Raises UserError for variables that contradict each other."""
    if "PET_NNODES" in os.environ:
        count = _number("PET_NNODES")
        if count == 1:
            return ONE_NODE
        nodes = Nodes(
            count, _number("PET_NODE_RANK"), _text("PET_MASTER_ADDR"), _number("PET_MASTER_PORT", DEFAULT_PORT)
        )
    elif in_slurm_step() and _number("SLURM_STEP_NUM_NODES") > 1:
        from lightning_fabric.plugins.environments import SLURMEnvironment

        first = SLURMEnvironment.resolve_root_node_address(_text("SLURM_STEP_NODELIST"))
        # Two jobs on one machine do not meet at one port.
        nodes = Nodes(
            _number("SLURM_STEP_NUM_NODES"), _number("SLURM_NODEID"), first, 20000 + _number("SLURM_JOB_ID") % 10000
        )
    else:
        return ONE_NODE
    if not 0 <= nodes.rank < nodes.count:
        raise UserError(f"this is node {nodes.rank} of {nodes.count}: number the nodes from 0")
    return nodes


def in_slurm_step() -> bool:
    return "SLURM_STEP_NUM_NODES" in os.environ


def srun_command(command: list[str]) -> list[str] | None:
    """What starts `command` once on every node of the SLURM job whose batch script this is in; None elsewhere."""
    count = os.environ.get("SLURM_JOB_NUM_NODES", "1")
    if count == "1" or in_slurm_step() or "PET_NNODES" in os.environ:
        return None
    return ["srun", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "--kill-on-bad-exit=1", *command]


def processes_per_node(nodes: int, tp_size: int, dp_size: int) -> int:
    """Ranks of one node. Raises UserError unless replicas spread evenly, each whole on one node."""
    if dp_size % nodes:
        raise UserError(
            f"train.dp_size {dp_size} replicas do not spread over {nodes} nodes: make it a multiple of {nodes}"
        )
    return dp_size // nodes * tp_size


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise UserError(f"{name} in the environment must be a number{f', it is {text!r}' if text else ''}")
    return int(text)


def _text(name: str) -> str:
    if not os.environ.get(name):
        raise UserError(f"{name} is not in the environment, which says that there are several nodes")
    return os.environ[name]


# For the ranks ------------------------------------------------------------------------------------------------------


def count() -> int:
    """Of the nodes, in a rank."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def meet(inputs: dict[str, str], decision: Any) -> tuple[list[str], Any]:
    """Before training, through the store of torchrun's launchers: every node's address, and what rank 0 has decided.

    inputs: names and digests of what this node's ranks read; decision: of JSON's types, rank 0's counts.
    Raises UserError, on all ranks, unless all nodes have the same inputs.
    """
    import torch.distributed as dist

    store, rank, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=START_SECONDS)))
    if os.environ["LOCAL_RANK"] == "0":
        store.set(f"trnlora/node/{os.environ['GROUP_RANK']}", json.dumps([own_address(), inputs]))
    if rank == 0:
        store.set("trnlora/decision", json.dumps(decision))
    told = [json.loads(store.get(f"trnlora/node/{node}")) for node in range(count())]
    _, of_first = told[0]
    for address, of_node in told[1:]:
        for name, digest in of_first.items():
            if of_node.get(name) != digest:
                raise UserError(
                    f"{name} of node {address} is not that of the first node: share the folder, or make it there "
                    "from the same commit and params (`dvc repro prepare_data convert_nxd`)"
                )
    return [address for address, _ in told], json.loads(store.get("trnlora/decision"))


def choose_interface() -> None:
    """Have gloo talk over the network on which the nodes meet; its own choice is that of the host name, often 127.…"""
    import psutil

    own = own_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == own for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def own_address() -> str:
    """This node's address on the network where the nodes meet."""
    where = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    family, kind, _, _, address = socket.getaddrinfo(*where, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing
        return str(probe.getsockname()[0])


def limit_waiting(groups: list[Any]) -> None:
    """From here on, collectives of these groups fail after SILENCE_SECONDS. Called when every rank has its model."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _set_pg_timeout

    dist.barrier()
    for group in groups:
        _set_pg_timeout(timedelta(seconds=SILENCE_SECONDS), group)


@contextlib.contextmanager
def lost_nodes_named(addresses: list[str]) -> Iterator[None]:
    """Turn what a collective raises when another node is gone into a UserError that names the node.

    A node that is there refuses a connection to a port where nobody listens; one that is gone says nothing.
    """
    try:
        yield
    except RuntimeError as error:
        lost = [address for address in addresses if not _answers(address)]
        if lost:
            raise UserError(
                f"no answer from node {', '.join(lost)}, the machine or its network is down; run it again on nodes "
                "that are up to go on from the last checkpoint"
            ) from None
        peer = re.search(r"by peer \[(.+?)\]:", str(error))
        if peer and peer[1] in addresses and peer[1] != addresses[int(os.environ["GROUP_RANK"])]:
            raise UserError(f"a rank on node {peer[1]} ended; that node's output says why") from None
        raise


def _answers(address: str) -> bool:
    try:
        socket.create_connection((address, 1), timeout=3).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True
