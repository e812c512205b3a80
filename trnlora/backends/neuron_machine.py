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

from trnlora.backends import nxd_environment
from trnlora.errors import UserError
from trnlora.params import Params, supported_ranks

DRIVER = Path("/sys/module/neuron/version")
MOUNTS = Path("/proc/mounts")
# What AWS sets against "Too many open files" with many ranks, which open sockets to each other. Source: aws-neuron-sdk,
# archive/nxd-training/training-troubleshooting.rst.
OPEN_FILES = 65536
NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "lustre", "cifs", "smb3")  # EFS is nfs4; FSx is one of these


def prepare(params: Params, ranks_per_node: int, num_nodes: int) -> None:
    """Raise the limit on open files. Raises UserError if ranks could not start on this node, or would spoil others."""
    check_ranks_of_nodes(params, ranks_per_node, num_nodes)
    check_cache_of_nodes(params, num_nodes)
    check_free_cores(ranks_per_node, params.neuron.logical_core_size)
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

    Keys: nc_count (logical cores), logical_neuroncore_config (trn2 only), neuron_processes with pid and command, …
    Source: aws-neuron-sdk, tools/neuron-sys-tools/neuron-ls.rst.
    """
    tool = shutil.which("neuron-ls", path=f"{os.environ.get('PATH', '')}:/opt/aws/neuron/bin")
    if tool is None:
        return None
    try:
        listed = subprocess.run([tool, "--json-output"], capture_output=True, text=True, check=False, timeout=60)
        found: list[dict[str, Any]] = [dict(device) for device in json.loads(listed.stdout)]
        logical_cores(found, 1)
    except (ValueError, KeyError, TypeError, OSError, subprocess.TimeoutExpired):
        return None
    return found


def logical_cores(found: list[dict[str, Any]], logical_core_size: int) -> int:
    """Number of logical cores of these devices when a run joins `logical_core_size` physical ones.

    neuron-ls counts logical cores by the machine's setting, which the run's variable overrides. trn1 has none.
    """
    physical = sum(int(device["nc_count"]) * int(device.get("logical_neuroncore_config", 1)) for device in found)
    return physical // logical_core_size


def check_free_cores(needed: int, logical_core_size: int) -> None:
    """Raise UserError, which names the processes, if others leave fewer than `needed` logical cores.

    A core cannot be used by two processes. neuron-ls lists processes per device, so a device that one uses counts as
    used. Does nothing without neuron-ls.
    """
    found = devices()
    if found is None:
        return
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


def check_cache_of_nodes(params: Params, num_nodes: int) -> None:
    """Raise UserError if several nodes would compile into one folder of a network file system, whose locks do not hold.

    AWS's remedy, a folder per node whose path has the host's name in it, passes. Source: aws-neuron-sdk,
    archive/nxd-training/training-troubleshooting.rst, "Compilation errors when placing NeuronCache home directory on
    NFS/EFS/FSx mounted drive".
    """
    cache = nxd_environment.compile_cache(params)
    if num_nodes == 1 or cache.startswith("s3://") or socket.gethostname() in Path(cache).absolute().parts:
        return
    kind = file_system(Path(cache))
    if kind in NETWORK_FILE_SYSTEMS:
        raise UserError(
            f"the compile cache {cache} is on {kind}, where {num_nodes} nodes would corrupt it: set "
            "neuron.compile_cache to s3://bucket/path or to a folder on each node's own disk, such as "
            "/var/tmp/neuron-compile-cache"
        )
