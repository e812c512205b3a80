"""What is particular to Trainium machines: environments, versions, variables. Imports no torch, no Neuron package."""

import json
import os
import subprocess
from pathlib import Path

from trnlora.nodes import ONE_NODE, Nodes, processes_per_node
from trnlora.params import Params

# neuronx-distributed of SDK 2.29 (0.18), 2.30 and 2.31 (0.19), as read in its repository and its release notes.
NXD_VERSIONS = ("0.18", "0.19")

_ASK = """
import importlib.metadata as m, json, sys
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
print(json.dumps({name: version(name) for name in sys.argv[1:]}))
"""


def installed(python: str, packages: tuple[str, ...]) -> dict[str, str | None] | None:
    """Versions of packages in the environment of another Python, None for what is missing; None without that Python."""
    try:
        said = subprocess.run([python, "-c", _ASK, *packages], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    versions: dict[str, str | None] = json.loads(said.stdout)
    return versions


def training_environment(params: Params, here: Nodes = ONE_NODE) -> dict[str, str]:
    """Environment variables of the training processes, and of the compiler that they start.

    Those of AWS's LoRA script (neuronx-distributed, test/integration/modules/lora/test_llama_lora_finetune.sh), but
    for XLA_USE_BF16, which would make the float32 adapter bfloat16 as well: dtypes are the tensors' own here. FI_… for
    several nodes are of its examples (examples/training/llama/lightning/run_llama_7b_tp_ptl.sh).
    What the user has set stays.
    """
    neuron = params.neuron
    cores = str(processes_per_node(here.count, params.convert.tp_size, params.train.dp_size))
    env = {
        # transformer: the compiler's optimizations for this kind of model; -O1 compiles layers once and reuses them.
        "NEURON_CC_FLAGS": neuron.cc_flags,
        "NEURON_COMPILE_CACHE_URL": neuron.compile_cache,
        # Softmax as one operation of the compiler.
        "NEURON_FUSE_SOFTMAX": "1",
        # The host may run this many executions ahead of the device.
        "NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS": "3",
        # glibc makes 8 heaps a core of the host by default, which costs tens of GB with dozens of processes.
        "MALLOC_ARENA_MAX": "64",
        # One process a logical core, as many as the run has on this node; torch_xla counts with its names for TPUs.
        "NEURON_RT_NUM_CORES": cores,
        "NUM_NEURONCORES": cores,
        "TPU_NUM_DEVICES": cores,
        "TPU_CHIPS_PER_HOST_BOUNDS": cores,
        # Where the ranks of the collectives meet.
        "NEURON_RT_ROOT_COMM_ID": f"{'localhost' if here.count == 1 else here.address}:48620",
    }
    if here.count > 1:
        # Collectives over EFA, from and to the devices' own memory.
        env |= {"FI_PROVIDER": "efa", "FI_EFA_USE_DEVICE_RDMA": "1", "FI_EFA_FORK_SAFE": "1"}
    if params.convert.hw_backend == "trn2":
        env["NEURON_LOGICAL_NC_CONFIG"] = str(neuron.logical_core_size)
    env = {name: os.environ.get(name, value) for name, value in env.items()}
    # The stages are files of this project, which the Neuron environment has not installed.
    root, given = str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")
    if root not in given.split(os.pathsep):
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, given]))
    return env
