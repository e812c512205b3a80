"""Training on several nodes: where ranks start, how they find each other, and how a lost node is reported.

The launcher reads the rendezvous from the environment:

    RANK, WORLD_SIZE, …                                          torchrun has started this process as a rank
    PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR, PET_MASTER_PORT  torchrun's own names for its flags (--nnodes, …)
    SLURM_JOB_NUM_NODES …                                        a SLURM job; SLURM_STEP_…: inside its `srun`
    none of these                                                one node

All ranks of one tensor-parallel replica run on one node. The first replica, on the first node, writes all outputs. So
nodes may share a folder, or each may have its own folder with the same inputs.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from trnlora.errors import UserError

START_SECONDS = 1800  # all nodes must join within this time
SILENCE_SECONDS = 40  # how long a collective may wait for another node once training runs
DEFAULT_PORT = 29500  # torchrun's


@dataclasses.dataclass(frozen=True)
class Nodes:
    """Number of nodes, the rank of this one (from 0), and address and port of the first one, where all nodes meet."""

    count: int = 1
    rank: int = 0
    address: str = "127.0.0.1"
    port: int = 0


ONE_NODE = Nodes()


def from_environment() -> Nodes:
    """The nodes of this run, for its launcher. Raises UserError for contradictory environment variables."""
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
        # Two jobs on one machine must not use the same port.
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
    """The `srun` command that starts `command` once on every node, in a SLURM job's batch script; None elsewhere."""
    count = os.environ.get("SLURM_JOB_NUM_NODES", "1")
    if count == "1" or in_slurm_step() or "PET_NNODES" in os.environ:
        return None
    return ["srun", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "--kill-on-bad-exit=1", *command]


def processes_per_node(nodes: int, tp_size: int, dp_size: int) -> int:
    """Number of ranks on each node. Raises UserError unless the replicas spread evenly, each on one node."""
    if dp_size % nodes:
        raise UserError(
            f"train.dp_size {dp_size} replicas do not spread over {nodes} nodes: set it to a multiple of {nodes}"
        )
    return dp_size // nodes * tp_size


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise UserError(f"{name} in the environment must be a number{f', it is {text!r}' if text else ''}")
    return int(text)


def _text(name: str) -> str:
    if not os.environ.get(name):
        raise UserError(f"{name} is not in the environment, but other variables there describe several nodes")
    return os.environ[name]


# For the ranks ------------------------------------------------------------------------------------------------------


def num_nodes() -> int:
    """Number of nodes, as torchrun tells each rank."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def check_same_inputs(inputs: dict[str, str]) -> list[str]:
    """Compare the inputs of all nodes before training, through the store of torchrun's launchers.

    inputs: digests of this node's inputs by name. Returns every node's address. Raises UserError, on all ranks, if the
    nodes have different inputs.
    """
    store = _store()
    if os.environ["LOCAL_RANK"] == "0":
        store.set(f"trnlora/node/{os.environ['GROUP_RANK']}", json.dumps([own_address(), inputs]))
    nodes = [json.loads(store.get(f"trnlora/node/{node}")) for node in range(num_nodes())]
    _, expected = nodes[0]
    for address, found in nodes[1:]:
        for name, digest in expected.items():
            if found.get(name) != digest:
                raise UserError(
                    f"{name} on node {address} differs from that on the first node: share the folder, or make it "
                    "there from the same commit and params (`dvc repro prepare_data convert_nxd`)"
                )
    return [address for address, _ in nodes]


def broadcast_from_first(value: Any) -> Any:
    """Rank 0's `value` (JSON types) on every rank, sent through the same store."""
    store = _store()
    if os.environ["RANK"] == "0":
        store.set("trnlora/decision", json.dumps(value))
    return json.loads(store.get("trnlora/decision"))


def gather(name: str, value: Any) -> list[Any]:
    """Every rank's `value` (JSON types), by rank, through the same store: not all process groups carry objects.

    Call on all ranks, once for a name.
    """
    store = _store()
    store.set(f"trnlora/{name}/{os.environ['RANK']}", json.dumps(value))
    return [json.loads(store.get(f"trnlora/{name}/{rank}")) for rank in range(int(os.environ["WORLD_SIZE"]))]


@functools.cache
def _store() -> Any:
    import torch.distributed as dist

    return next(dist.rendezvous("env://", timeout=timedelta(seconds=START_SECONDS)))[0]


def choose_interface() -> None:
    """Make gloo use the network on which the nodes meet. Its default is that of the host name, often 127.0.0.1."""
    import psutil

    own = own_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == own for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def own_address() -> str:
    """This node's address on the network on which the nodes meet."""
    where = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    family, kind, _, _, address = socket.getaddrinfo(*where, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing
        return str(probe.getsockname()[0])


def limit_waiting(groups: list[Any]) -> None:
    """From now on, let collectives of these groups fail after SILENCE_SECONDS. Call when every rank has its model."""
    from torch.distributed.distributed_c10d import _set_pg_timeout

    for group in groups:
        _set_pg_timeout(timedelta(seconds=SILENCE_SECONDS), group)


@contextlib.contextmanager
def name_lost_nodes(addresses: list[str]) -> Iterator[None]:
    """Turn the error that a collective raises when another node is lost into a UserError that names the node.

    A node that is up refuses connections to a port on which nothing listens. A node that is down does not answer.
    """
    try:
        yield
    except RuntimeError as error:
        lost = [address for address in addresses if not _answers(address)]
        if lost:
            raise UserError(
                f"no answer from node {', '.join(lost)}: the machine or its network is down; rerun on nodes that are "
                "up to resume from the last checkpoint"
            ) from None
        peer = re.search(r"by peer \[(.+?)\]:", str(error))
        if peer and peer[1] in addresses and peer[1] != addresses[int(os.environ["GROUP_RANK"])]:
            raise UserError(f"a rank on node {peer[1]} ended; see that node's output for the reason") from None
        raise


def _answers(address: str) -> bool:
    try:
        socket.create_connection((address, 1), timeout=3).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True
