"""A Trainium machine as the runtime sees it: driver, devices and who uses them, open files, the compile cache's disk.

Imports neither torch nor a Neuron package. On another machine there are no devices, and `prepare` checks only what the
params say.
"""

import json
import os
import re
import resource
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

from trnlora.errors import UserError
from trnlora.params import Params, supported_ranks

DRIVER = Path("/sys/module/neuron/version")
MOUNTS = Path("/proc/mounts")
# What AWS sets against "Too many open files" with many ranks, which open sockets to each other. Source: aws-neuron-sdk,
# archive/nxd-training/training-troubleshooting.rst.
OPEN_FILES = 65536
CPU_LIST = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")  # as in "0-47,96-143"
CPUS_OF_RANKS = "TRNLORA_CPUS_OF_RANKS"  # the lists of all ranks of this machine, separated by semicolons
NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "lustre", "cifs", "smb3")  # EFS is nfs4; FSx is one of these


def prepare(params: Params, cache: str, ranks_per_node: int, num_nodes: int) -> None:
    """Raise the limit on open files. Raises UserError if ranks could not start on this node, or would spoil others.

    cache: where compiled graphs are kept.
    """
    check_ranks_of_nodes(params, ranks_per_node, num_nodes)
    check_cache_of_nodes(cache, num_nodes)
    check_free_cores(ranks_per_node, params.neuron.logical_core_size, first=params.backend == "neuron")
    raise_open_files()


def check_ranks_of_nodes(params: Params, ranks_per_node: int, num_nodes: int) -> None:
    """Raise UserError unless each of several nodes is used in full.

    Only the largest instances have EFA. Source: aws-neuron-sdk,
    frameworks/torch/torch-neuronx/setup-trn1-multi-node-execution.rst.
    """
    supported = supported_ranks(params)
    if num_nodes > 1 and supported and ranks_per_node != supported[-1]:
        raise UserError(
            f"{ranks_per_node} ranks on each of {num_nodes} nodes, but only full ones, with {supported[-1]}, train "
            f"together: set train.dp_size × convert.tp_size to {supported[-1] * num_nodes}, or use fewer nodes"
        )


def devices() -> list[dict[str, Any]] | None:
    """The Neuron devices, as `neuron-ls --json-output` lists them; None without a working neuron-ls.

    Keys: neuron_device (its number), nc_count (logical cores), logical_neuroncore_config (trn2 only), cpu_affinity,
    neuron_processes with pid and command, …
    Source: aws-neuron-sdk, tools/neuron-sys-tools/neuron-ls.rst.
    """
    listed = _neuron_ls("--json-output")
    try:
        found: list[dict[str, Any]] = [dict(device) for device in json.loads(listed or "")]
        logical_cores(found, 1)
    except (ValueError, KeyError, TypeError):
        return None
    return found


def _neuron_ls(*arguments: str) -> str | None:
    tool = shutil.which("neuron-ls", path=f"{os.environ.get('PATH', '')}:/opt/aws/neuron/bin")
    if tool is None:
        return None
    try:
        return subprocess.run([tool, *arguments], capture_output=True, text=True, check=False, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None


def logical_cores(found: list[dict[str, Any]], logical_core_size: int) -> int:
    """Number of logical cores of these devices when a run joins `logical_core_size` physical ones.

    neuron-ls counts logical cores by the machine's setting, which the run's variable overrides. trn1 has none.
    """
    physical = sum(int(device["nc_count"]) * int(device.get("logical_neuroncore_config", 1)) for device in found)
    return physical // logical_core_size


def instance_type() -> str | None:
    """The EC2 instance type, as the text output of neuron-ls begins with it; None without a working neuron-ls."""
    found = re.search(r"^instance-type:\s*(\S+)", _neuron_ls() or "", re.MULTILINE)
    return found[1] if found else None


def cpus_of_ranks(found: list[dict[str, Any]], ranks: int, logical_core_size: int) -> list[str]:
    """For each rank of this machine, the host's processors beside its device, as in "0-47,96-143".

    Rank n has the logical core n. Empty if neuron-ls does not say it for all of them.
    """
    lists: list[str] = []
    for device in sorted(found, key=lambda device: int(device.get("neuron_device", 0))):
        beside = str(device.get("cpu_affinity") or "")
        lists += [beside] * logical_cores([device], logical_core_size)
    lists = lists[:ranks]
    return lists if len(lists) == ranks and all(map(CPU_LIST.fullmatch, lists)) else []


def pinning(ranks: int, logical_core_size: int) -> dict[str, str]:
    """The environment variable by which the ranks of this machine pin themselves; none if it is not known where to.

    AWS: threads that work with a core may gain from running on the NUMA node of its device, which neuron-ls prints
    (aws-neuron-sdk, neuron-runtime/explore/runtime-performance-tips.rst, "Respect the NUMA node layout"). Without it
    and with too many threads, training on a trn2.48xlarge took twice as long (third party: xscript, NEURON.md).
    """
    lists = cpus_of_ranks(devices() or [], ranks, logical_core_size)
    return {CPUS_OF_RANKS: ";".join(lists)} if lists else {}


def pin_rank() -> None:
    """Let this rank, and the threads that it will start, run on the processors that `pinning` has found for it.

    Only on those that it may use already: the user, a container or a batch system may have given it fewer.
    """
    if CPUS_OF_RANKS not in os.environ:
        return
    beside = os.environ[CPUS_OF_RANKS].split(";")[int(os.environ["LOCAL_RANK"])]
    cpus = {
        cpu
        for part in beside.split(",")
        for cpu in range(int(part.partition("-")[0]), int(part.rpartition("-")[2]) + 1)
    }
    if allowed := cpus & os.sched_getaffinity(0):
        os.sched_setaffinity(0, allowed)


def check_free_cores(needed: int, logical_core_size: int, first: bool = False) -> None:
    """Raise UserError, which names the processes, if others leave fewer than `needed` logical cores.

    first: only the cores from 0 to `needed` - 1 will do. A core cannot be used by two processes. neuron-ls lists
    processes per device, so a device that one uses counts as used. Does nothing without neuron-ls.
    """
    found = devices()
    if found is None:
        return
    if first:
        each = max(1, logical_cores(found[:1], logical_core_size))
        found = [device for device in found if int(device.get("neuron_device", 0)) * each < needed]
    free = logical_cores([device for device in found if not device.get("neuron_processes")], logical_core_size)
    holders = {
        int(process["pid"]): str(process.get("command", "?"))
        for device in found
        for process in device.get("neuron_processes") or ()
    }
    if free < needed and holders:
        shown = [f"{pid} ({command})" for pid, command in sorted(holders.items())]
        more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
        raise UserError(
            f"{free} of {logical_cores(found, logical_core_size)} Neuron cores are free and {needed} are needed: "
            f"others are held by process {', '.join(shown[:3])}{more}; stop it (kill PID, or Ctrl-C in `make serve`)"
        )


def open_files() -> int:
    """How many files a rank may have open: OPEN_FILES, or fewer where the hard limit is lower."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)


def raise_open_files() -> None:
    """Raise the soft limit of this process, and so of the ranks that it starts, to `open_files()`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < open_files():
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_files(), hard))


def file_system(path: Path) -> str:
    """The type of the file system that `path` is, or will be, on: of the mount with the longest prefix."""
    resolved, best, kind = path.resolve(), Path("/"), "unknown"
    for line in MOUNTS.read_text("utf-8").splitlines():
        _, point, found, *_ = line.split(" ")
        mount = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), point))  # \040: a space
        if resolved.is_relative_to(mount) and mount.is_relative_to(best):
            best, kind = mount, found  # of two mounts at one point, the later one hides the earlier
    return kind


def check_cache_of_nodes(cache: str, num_nodes: int) -> None:
    """Raise UserError if several nodes would compile into one folder of a network file system, whose locks do not hold.

    AWS's remedy, a folder per node whose path has the host's name in it, passes. Source: aws-neuron-sdk,
    archive/nxd-training/training-troubleshooting.rst, "Compilation errors when placing NeuronCache home directory on
    NFS/EFS/FSx mounted drive". torch_neuronx replaces files in one step, so that its cache should bear it; nobody has
    tried that here.
    """
    if num_nodes == 1 or cache.startswith("s3://") or socket.gethostname() in Path(cache).absolute().parts:
        return
    kind = file_system(Path(cache))
    if kind in NETWORK_FILE_SYSTEMS:
        raise UserError(
            f"the compile cache {cache} is on {kind}, where {num_nodes} nodes would corrupt it: set "
            "neuron.compile_cache to a folder on each node's own disk, such as /var/tmp/neuron-compile-cache (or, with "
            "backend nxd, to s3://bucket/path)"
        )
