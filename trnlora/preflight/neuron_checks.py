"""The checks of `make doctor` on a Trainium machine: a line on what was found, or UserError with what is wrong."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from trnlora import requirements
from trnlora.backends import neuron_machine, nxd_environment
from trnlora.errors import UserError
from trnlora.params import Params, supported_ranks
from trnlora.preflight.known_models import weights_gib
from trnlora.preflight.precompile import available_gib, compiler_gib, parallel_compilers
from trnlora.training import cluster

PACKAGES = ("torch-neuronx", "neuronx-distributed", "neuronx-cc")  # the machine image's
MANY_RANKS = 32  # on one machine, from which on the limit on open files matters


def neuron_checks(params: Params) -> Iterator[Callable[[], str]]:
    """The checks for params of backend nxd."""
    yield partial(check_neuron, params)
    if neuron_machine.DRIVER.exists():
        yield partial(check_driver, params)
        yield partial(check_free_cores, params)
    yield partial(check_open_files, params)
    yield partial(check_compile_cache, params)
    yield partial(check_compiler_memory, params)


def nodes(params: Params) -> int:
    """Number of nodes: as the environment says, or at least as many as the ranks fill."""
    supported = supported_ranks(params)
    ranks = params.convert.tp_size * params.train.dp_size
    return max(cluster.from_environment().count, ranks // supported[-1] if supported else 1)


def ranks_per_node(params: Params) -> int:
    """Number of ranks on this machine."""
    return cluster.processes_per_node(nodes(params), params.convert.tp_size, params.train.dp_size)


def check_neuron(params: Params) -> str:
    """Driver, number of cores and training environment of a Trainium machine; all that is missing in one line."""
    missing = [*_missing_hardware(params), *_missing_packages(params), *_forced_dtypes()]
    if missing:
        raise UserError(f"backend {params.backend} lacks " + "; ".join(missing))
    found = neuron_machine.devices() or []
    return (
        f"backend {params.backend}: {neuron_machine.logical_cores(found, params.neuron.logical_core_size)} cores for "
        f"{ranks_per_node(params)} training processes, {nxd_environment.training_python(params)}"
    )


def _missing_hardware(params: Params) -> Iterator[str]:
    if not neuron_machine.DRIVER.exists():
        yield "the Neuron driver (start AWS's Neuron machine image, or install aws-neuronx-dkms)"
        return
    found, needed = neuron_machine.devices(), ranks_per_node(params)
    if found is None:
        yield "neuron-ls (install aws-neuronx-tools)"
    elif (cores := neuron_machine.logical_cores(found, params.neuron.logical_core_size)) < needed:
        yield (
            f"cores: {cores} of the {needed} of dp_size × tp_size (lower train.dp_size; a trn2.48xlarge has 64 with "
            "neuron.logical_core_size 2, a trn1.32xlarge 32)"
        )


def _missing_packages(params: Params) -> Iterator[str]:
    """Packages of the training environment: AWS's, and those of pyproject.toml's group neuron."""
    python = nxd_environment.training_python(params)
    found = nxd_environment.installed(python, (*PACKAGES, *requirements.group("neuron")))
    if found is None:
        yield f"neuron.python {python} (set it to the Python of your Neuron environment: ls -d /opt/aws_neuronx*)"
        return
    missing = [name for name, version in found.items() if version is None]
    if missing:
        yield f'{", ".join(missing)} in {python} (docs/trainium.md, "The environments")'
    programs = [name for name in nxd_environment.PROGRAMS if not os.access(Path(python).with_name(name), os.X_OK)]
    if programs:
        yield (
            f"{', '.join(programs)} beside {python} (neuron.python must be in the bin folder of an environment with "
            "torch-neuronx and neuronx-cc: training starts these programs by name)"
        )
    nxd = found["neuronx-distributed"]
    if nxd and not nxd.startswith(nxd_environment.NXD_VERSIONS):
        yield (
            f"a supported neuronx-distributed: {nxd} is not one of {', '.join(nxd_environment.NXD_VERSIONS)} "
            "(SDK 2.29 to 2.31, the last one with NxD on the machine image)"
        )


def _forced_dtypes() -> Iterator[str]:
    forced = [name for name in ("XLA_USE_BF16", "XLA_DOWNCAST_BF16") if os.environ.get(name, "0") != "0"]
    if forced:
        yield f"float32: {', '.join(forced)} makes the adapter bfloat16 (unset it)"


def check_driver(params: Params) -> str:
    """The driver against the SDK of the training environment."""
    driver = neuron_machine.DRIVER.read_text("utf-8").strip()
    found = nxd_environment.installed(nxd_environment.training_python(params), ("neuronx-cc",)) or {}
    compiler = found.get("neuronx-cc")
    sdk = nxd_environment.sdk_of(compiler) if compiler else None
    if sdk is None:
        return f"Neuron driver {driver}; neuronx-cc {compiler or 'is missing'}, so it is not known whether they fit"
    nxd_environment.check_driver(driver, sdk)
    return f"Neuron driver {driver} and neuronx-cc {compiler} fit (SDK {sdk.name}, released with driver {sdk.driver})"


def check_free_cores(params: Params) -> str:
    """Whether other processes leave the run's cores free."""
    needed = ranks_per_node(params)
    neuron_machine.check_free_cores(needed, params.neuron.logical_core_size)
    return f"no other process holds the {needed} cores"


def check_open_files(params: Params) -> str:
    """Whether the launcher can raise the limit on open files far enough."""
    ranks, allowed = ranks_per_node(params), neuron_machine.open_files()
    if allowed < neuron_machine.OPEN_FILES and ranks >= MANY_RANKS:
        raise UserError(
            f"{allowed} open files allowed, {ranks} ranks need {neuron_machine.OPEN_FILES}: add the line "
            f'"* hard nofile {neuron_machine.OPEN_FILES}" to /etc/security/limits.conf, raise it in '
            "/etc/security/limits.d too, and log in again (docker run: --ulimit nofile=65536:65536)"
        )
    return f"{allowed} open files allowed"


def check_compile_cache(params: Params) -> str:
    """Whether the compile cache can be written, and whether several nodes would share it over a network file system."""
    cache = nxd_environment.compile_cache(params)
    if cache.startswith("s3://"):
        return f"compile cache {cache}"
    parent = next(folder for folder in (Path(cache), *Path(cache).absolute().parents) if folder.exists())
    if not os.access(parent, os.W_OK):
        raise UserError(f"compile cache {cache} cannot be written: set neuron.compile_cache to a folder that can")
    neuron_machine.check_cache_of_nodes(params, nodes(params))
    kind = neuron_machine.file_system(Path(cache))
    if kind in neuron_machine.NETWORK_FILE_SYSTEMS:
        return f"compile cache {cache} is on {kind}: let no other machine use this folder, its files could be corrupted"
    return f"compile cache {cache} on {kind}"


def check_compiler_memory(params: Params) -> str:
    """Host memory for the compilers, as a note: what one needs is an estimate."""
    available, each, weights = available_gib(), compiler_gib(params), weights_gib(params) or 0.0
    if available < each + weights:
        return (
            f"{available:.0f} GiB of memory available may be too little to compile (about {each:.0f} per compiler, "
            f"{weights:.0f} for weights): if neuronx-cc ends with -9, lower data.seq_len or take a larger instance"
        )
    return f"memory for {parallel_compilers(params)} compilers of about {each:.0f} GiB at a time"
