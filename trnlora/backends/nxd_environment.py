"""The Neuron environment that NxD needs: package versions and environment variables.

Imports neither torch nor a Neuron package.
"""

import dataclasses
import os
import re

from trnlora.backends.python_environment import process_environment, training_python
from trnlora.errors import UserError
from trnlora.params import Params


@dataclasses.dataclass(frozen=True)
class Sdk:
    """A release of the Neuron SDK that has NxD, and the drivers (major, minor) that its runtime works with."""

    name: str
    nxd: str  # the beginning of neuronx-distributed's version
    compiler: str  # of neuronx-cc's
    driver: str  # of aws-neuronx-dkms's, as released
    oldest: tuple[int, int]
    too_new: tuple[int, int] | None = None


# Sources: aws-neuron-sdk, src/helperscripts/n2-manifest.json for the versions, and neuron-runtime/nrt-troubleshoot.rst:
# a newer driver serves an older runtime, and a newer runtime may need a newer driver. Exceptions are in
# release-notes/components/runtime.rst: runtime 2.32 (SDK 2.30) does not work with driver 2.26 or older, and driver 2.29
# needs runtime 2.33 (SDK 2.31). NxD's versions are from its repository and its release notes.
SDKS = (
    Sdk("2.29", "0.18", "2.24", "2.27.4.0", (2, 27), (2, 29)),
    Sdk("2.30", "0.19", "2.25", "2.28.0.0", (2, 27), (2, 29)),
    Sdk("2.31", "0.19", "2.26", "2.29.0.0", (2, 29)),
)
NXD_VERSIONS = tuple(dict.fromkeys(sdk.nxd for sdk in SDKS))
# Programs of the training environment that torch_neuronx and libneuronxla start by name, so that they must be on PATH.
PROGRAMS = ("neuronx-cc", "libneuronpjrt-path")
# The cache keeps failed compilations, also of a compiler that was killed for lack of memory, and a later run would fail
# at once without this flag. It is read by the compiler's wrapper only, and AWS's NxD examples train with it. Sources:
# aws-neuron-sdk, about-neuron/arch/neuron-features/neuron-caching.rst; neuronx-distributed,
# examples/training/llama/lightning/run_llama_7b_tp_ptl.sh.
RETRY = "--retry_failed_compilation"


def sdk_of(compiler: str) -> Sdk | None:
    """The release that a version of neuronx-cc is from; None if it has no NxD."""
    return next((sdk for sdk in SDKS if compiler.split(".")[:2] == sdk.compiler.split(".")), None)


def check_driver(driver: str, sdk: Sdk) -> None:
    """Raise UserError if the runtime of `sdk` does not work with a version of the driver."""
    major, minor = (int(part) for part in driver.split(".")[:2])
    if (major, minor) < sdk.oldest or (sdk.too_new and (major, minor) >= sdk.too_new):
        raise UserError(
            f"Neuron driver {driver} does not fit SDK {sdk.name}, which neuron.python has: install that of the release "
            f"(sudo apt-get install --allow-downgrades aws-neuronx-dkms={sdk.driver}*), stop all processes on the "
            "devices and reload it (sudo rmmod neuron && sudo modprobe neuron)"
        )


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
        "NEURON_CC_FLAGS": f"{neuron.cc_flags} {RETRY}",
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
    return process_environment(training_python(params), env)


def compile_cache(params: Params) -> str:
    """The folder or s3:// address in which compiled graphs are kept, with the precedence that Neuron's cache has.

    Source: aws-neuron-sdk, about-neuron/arch/neuron-features/neuron-caching.rst.
    """
    flags = os.environ.get("NEURON_CC_FLAGS", params.neuron.cc_flags)
    in_flags = re.search(r"--cache_dir[= ]\s*[\"']?([^\s\"']+)", flags)
    return in_flags[1] if in_flags else os.environ.get("NEURON_COMPILE_CACHE_URL", params.neuron.compile_cache)
