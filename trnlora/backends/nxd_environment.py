"""The Neuron environment that NxD needs: its Python, package versions and environment variables.

Imports neither torch nor a Neuron package.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from trnlora.errors import UserError
from trnlora.params import Params

# neuronx-distributed of SDK 2.29 (0.18), 2.30 and 2.31 (0.19), from its repository and its release notes.
NXD_VERSIONS = ("0.18", "0.19")

_ASK = """
import importlib.metadata as m, json, sys
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
print(json.dumps({name: version(name) for name in sys.argv[1:]}))
"""


def installed(python: str, packages: tuple[str, ...]) -> dict[str, str | None] | None:
    """Versions of packages in another Python's environment; None for a missing one. None if it cannot run."""
    try:
        done = subprocess.run([python, "-c", _ASK, *packages], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    versions: dict[str, str | None] = json.loads(done.stdout)
    return versions


def with_own_bin(python: str, path: str) -> str:
    """`path` (a value of PATH) with the folder of `python` first; unchanged if it is first already.

    torch_xla's Neuron plugin and NxD look up `libneuronpjrt-path` and `neuronx-cc` on PATH. Both are next to the
    environment's Python, which is started by its path and not through an activated environment.
    """
    own = str(Path(python).absolute().parent)
    return path if path.split(os.pathsep)[0] == own else os.pathsep.join(filter(None, [own, path]))


def training_environment(
    params: Params, ranks_per_node: int, num_nodes: int = 1, first_address: str = "localhost"
) -> dict[str, str]:
    """Environment variables of the training processes, and of the compiler that they start.

    The same as in AWS's LoRA script (neuronx-distributed, test/integration/modules/lora/test_llama_lora_finetune.sh),
    except XLA_USE_BF16, which would also make the float32 adapter bfloat16: here tensors keep their own dtypes. FI_…,
    for several nodes, are from its examples (examples/training/llama/lightning/run_llama_7b_tp_ptl.sh).
    Variables that the user has set keep their values.
    """
    neuron = params.neuron
    env = {
        # --model-type=transformer: optimizations for this kind of model. -O1: compiles a layer once and reuses it.
        "NEURON_CC_FLAGS": neuron.cc_flags,
        "NEURON_COMPILE_CACHE_URL": neuron.compile_cache,
        # Compile softmax as one operation.
        "NEURON_FUSE_SOFTMAX": "1",
        # How many executions the host may queue ahead of the device.
        "NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS": "3",
        # By default, glibc makes 8 heaps per core of the host: tens of GB with dozens of processes.
        "MALLOC_ARENA_MAX": "64",
        # One process per logical core on this node. torch_xla reads the numbers under its TPU names.
        "NEURON_RT_NUM_CORES": str(ranks_per_node),
        "NUM_NEURONCORES": str(ranks_per_node),
        "TPU_NUM_DEVICES": str(ranks_per_node),
        "TPU_CHIPS_PER_HOST_BOUNDS": str(ranks_per_node),
        # Address at which the ranks of the collectives meet.
        "NEURON_RT_ROOT_COMM_ID": f"{'localhost' if num_nodes == 1 else first_address}:48620",
    }
    if num_nodes > 1:
        # Collectives over EFA, directly between the memories of the devices.
        env |= {"FI_PROVIDER": "efa", "FI_EFA_USE_DEVICE_RDMA": "1", "FI_EFA_FORK_SAFE": "1"}
    if params.convert.hw_backend == "trn2":
        env["NEURON_LOGICAL_NC_CONFIG"] = str(neuron.logical_core_size)
    env = {name: os.environ.get(name, value) for name, value in env.items()}
    # The stages import this project, which is not installed in the Neuron environment.
    root, given = str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")
    if root not in given.split(os.pathsep):
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, given]))
    return env


def rerun_in_neuron_environment(params: Params, ranks_per_node: int, num_nodes: int, first_address: str) -> None:
    """Replace this process by the same command with the Python and environment that Trainium needs, if they differ.

    Raises UserError when neuron.python is not an executable Python interpreter.
    """
    python = params.neuron.python or sys.executable
    env = training_environment(params, ranks_per_node, num_nodes, first_address)
    if python == sys.executable and env.items() <= os.environ.items():
        return
    if not os.access(python, os.X_OK):
        raise UserError(
            f"neuron.python {python} is not an executable Python interpreter: name that of your Neuron environment in "
            "params.yaml"
        )
    sys.stdout.flush()
    os.execve(python, [python, "-u", *sys.argv], {**os.environ, **env})
