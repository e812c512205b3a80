"""The environment of native PyTorch on Neuron: package versions and environment variables.

Imports neither torch nor a Neuron package. Of the sources that are named, torch-neuronx is a beta before SDK 2.33, and
aws-neuron-sdk's pages are those of SDK 2.33.
"""

import dataclasses
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from trnlora.backends.python_environment import process_environment, training_python
from trnlora.errors import UserError
from trnlora.params import Params

INDEX = "https://pip.repos.neuron.amazonaws.com"  # where AWS publishes them; tools/environment.sh has it too
# Programs of the training environment that torch_neuronx starts by name, so that they must be on PATH.
PROGRAMS = ("neuronx-cc",)
# Source: aws-neuron-sdk, release-notes/components/torchneuron.rst, "Support matrix".
PYTHONS = ((3, 12), (3, 13), (3, 14))
OLDEST_FAMILY = (2, 13)  # of torch and of torch-neuronx, which must be the same
UBUNTU = ("24.04", "26.04")
INSTANCES = ("trn2", "trn3")


@dataclasses.dataclass(frozen=True)
class Sdk:
    """A release of the Neuron SDK that has native PyTorch."""

    name: str
    compiler: str  # the beginning of neuronx-cc's version
    driver: str  # of aws-neuronx-dkms's, as released


# Source: aws-neuron-sdk, release-notes/components/index.rst.
SDKS = (Sdk("2.33", "2.28", "2.31.7.0"),)


def number(version: str, parts: int = 2) -> tuple[int, ...]:
    """The first numbers of a version: (2, 13) for 2.13.3.0.1234."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:parts])


def sdk_of(compiler: str) -> Sdk | None:
    """The release that a version of neuronx-cc is from; None for another than those in SDKS."""
    return next((sdk for sdk in SDKS if number(compiler) == number(sdk.compiler)), None)


def check_packages(found: Mapping[str, str | None]) -> list[str]:
    """What is wrong with the versions of python, torch, torch-neuronx and neuronx-cc. One that is missing is not."""
    wrong = []
    python, torch, neuronx, compiler = (found[name] for name in ("python", "torch", "torch-neuronx", "neuronx-cc"))
    if python and number(python) not in PYTHONS:
        *others, last = (f"{major}.{minor}" for major, minor in PYTHONS)
        wrong.append(f"Python {', '.join(others)} or {last} (found {python})")
    if torch and number(torch) < OLDEST_FAMILY:
        oldest = ".".join(map(str, OLDEST_FAMILY))
        wrong.append(f"torch {oldest} or newer (found {torch}, for which torch-neuronx is PyTorch/XLA's: backend nxd)")
    elif torch and neuronx and number(neuronx) != number(torch):
        family = ".".join(map(str, number(torch)))
        wrong.append(
            f"torch-neuronx {family}.* for torch {torch} (found {neuronx}, but PyPI has a placeholder of that name, "
            f'and 2.9 is PyTorch/XLA\'s: uv pip install "torch-neuronx=={family}.*" --index {INDEX})'
        )
    if compiler and number(compiler) < number(SDKS[0].compiler):
        wrong.append(f"neuronx-cc {SDKS[0].compiler} or newer, of SDK {SDKS[0].name} (found {compiler})")
    return wrong


def check_variables(ranks_per_node: int) -> None:
    """Raise UserError for a variable of the user with which the ranks could not start.

    The process group gives each rank the core of its LOCAL_RANK, and its ranks the address at which they meet, unless
    the variables say otherwise; then all ranks would take the same cores. Source: torch-neuronx,
    torch_neuronx/distributed/backend.py, _set_rt_visible_cores.
    """
    cores = os.environ.get("NEURON_RT_VISIBLE_CORES")
    if cores and ranks_per_node > 1:
        raise UserError(
            f"NEURON_RT_VISIBLE_CORES is {cores}, which all {ranks_per_node} ranks would get: unset it, and each rank "
            "takes the core of its own number"
        )


def training_environment(params: Params, num_nodes: int = 1) -> dict[str, str]:
    """Environment variables of the training processes, and of the compiler that they start.

    Sources: aws-neuron-sdk, torch/reference/env-vars.rst, and torch-neuronx, csrc/core/cache/CompilationCache.cpp. For
    several nodes: aws-neuron-sdk, frameworks/torch/torch-neuronx/setup-trn1-multi-node-execution.rst.
    Variables that the user has set keep their values. NEURON_CC_FLAGS is not set: target, logical cores and -O1 are
    torch_neuronx's defaults. Neither are a rank's core and the address of the collectives: see `check_variables`.
    """
    env = {
        "TORCH_NEURONX_NEFF_CACHE_DIR": compile_cache(params),
        # The locks by which one rank compiles a graph and the others wait for it. They must be on a local disk, and a
        # folder of the user's own: AWS's default, /tmp/local_cache, may be another user's.
        "TORCH_NEURONX_NEFF_LOCAL_CACHE_DIR": str(Path(tempfile.gettempdir()) / f"neff-locks-{os.getuid()}"),
        # A graph that does not compile ends the run; it does not run slowly, operation by operation.
        "TORCH_NEURONX_DISABLE_FALLBACK_EXECUTION": "1",
        "NEURON_LOGICAL_NC_CONFIG": str(params.neuron.logical_core_size),
    }
    if num_nodes > 1:
        # Collectives over EFA, directly between the memories of the devices.
        env |= {"FI_PROVIDER": "efa", "FI_EFA_USE_DEVICE_RDMA": "1"}
    return process_environment(training_python(params), env)


def compile_cache(params: Params) -> str:
    """The folder in which compiled graphs are kept. Raises UserError for an address on S3."""
    cache = params.neuron.compile_cache
    if cache.startswith("s3://"):
        raise UserError(
            f"neuron.compile_cache {cache}: native PyTorch keeps compiled graphs in a folder: name one, such as "
            "/var/tmp/neuron-compile-cache"
        )
    # Beside what other programs keep in the same folder: vLLM, and backend nxd's compiler.
    return os.environ.get("TORCH_NEURONX_NEFF_CACHE_DIR", str(Path(cache).absolute() / "neff"))
