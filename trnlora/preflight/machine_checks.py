"""The checks of `make doctor` that are the same for all backends of Trainium.

Each check returns a line on what it found, or raises UserError with what is wrong. `missing_…` yield parts of one line.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from trnlora.backends import environment, neuron_machine
from trnlora.backends.python_environment import training_python
from trnlora.errors import UserError
from trnlora.params import Params, supported_ranks
from trnlora.preflight.caution import Caution
from trnlora.training import cluster

MANY_RANKS = 32  # on one machine, from which on the limit on open files matters


def machine_checks(params: Params) -> Iterator[Callable[[], str]]:
    """Who holds the cores, the limit on open files, the compile cache."""
    if neuron_machine.DRIVER.exists():
        yield partial(check_free_cores, params)
    yield partial(check_open_files, params)
    yield partial(check_compile_cache, params)


def nodes(params: Params) -> int:
    """Number of nodes: as the environment says, or at least as many as the ranks fill."""
    supported = supported_ranks(params)
    ranks = params.convert.tp_size * params.train.dp_size
    return max(cluster.from_environment().count, ranks // supported[-1] if supported else 1)


def ranks_per_node(params: Params) -> int:
    """Number of ranks on this machine."""
    return cluster.processes_per_node(nodes(params), params.convert.tp_size, params.train.dp_size)


def check_nothing_missing(params: Params, missing: list[str]) -> str:
    """The machine and its training environment in a line. Raises UserError with all that is missing, in one line."""
    if missing:
        raise UserError(f"backend {params.backend} lacks " + "; ".join(missing))
    found = neuron_machine.devices() or []
    return (
        f"backend {params.backend}: {neuron_machine.logical_cores(found, params.neuron.logical_core_size)} cores for "
        f"{ranks_per_node(params)} training processes, {training_python(params)}"
    )


def missing_hardware(params: Params) -> Iterator[str]:
    """Driver, tools and cores that the machine lacks."""
    if not neuron_machine.DRIVER.exists():
        yield "the Neuron driver (start AWS's Neuron machine image, or install aws-neuronx-dkms)"
        return
    found, needed = neuron_machine.devices(), ranks_per_node(params)
    if found is None:
        yield "neuron-ls (install aws-neuronx-tools)"
    elif (cores := neuron_machine.logical_cores(found, params.neuron.logical_core_size)) < needed:
        yield (
            f"cores: {cores} of the {needed} of dp_size × tp_size (lower train.dp_size: a trn2.48xlarge has 64 with "
            "neuron.logical_core_size 2, a trn2.3xlarge 4, a trn1.32xlarge 32)"
        )


def missing_packages(python: str, found: dict[str, str | None], remedy: str) -> Iterator[str]:
    """Packages of `found`, by version, that are not there. remedy: what installs them."""
    missing = [name for name, version in found.items() if version is None]
    if missing:
        yield f"{', '.join(missing)} in {python} ({remedy})"


def missing_programs(python: str, programs: tuple[str, ...]) -> Iterator[str]:
    """Programs that training starts by name and that are not beside its Python."""
    missing = [name for name in programs if not os.access(Path(python).with_name(name), os.X_OK)]
    if missing:
        yield (
            f"{', '.join(missing)} beside {python} (neuron.python must be in the bin folder of an environment with "
            "torch-neuronx and neuronx-cc: training starts these programs by name)"
        )


def unusable_python(python: str) -> str:
    """What is missing when the training Python does not run."""
    return f"neuron.python {python} (set it to the Python of your Neuron environment: ls -d /opt/aws_neuronx*)"


def check_free_cores(params: Params) -> str:
    """Whether other processes leave the run's cores free."""
    needed = ranks_per_node(params)
    neuron_machine.check_free_cores(needed, params.neuron.logical_core_size, first=params.backend == "neuron")
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
    cache = environment.compile_cache(params)
    if cache.startswith("s3://"):
        return f"compile cache {cache}"
    parent = next(folder for folder in (Path(cache), *Path(cache).absolute().parents) if folder.exists())
    if not os.access(parent, os.W_OK):
        raise UserError(f"compile cache {cache} cannot be written: set neuron.compile_cache to a folder that can")
    neuron_machine.check_cache_of_nodes(cache, nodes(params))
    kind = neuron_machine.file_system(Path(cache))
    if kind in neuron_machine.NETWORK_FILE_SYSTEMS:
        return Caution(
            f"compile cache {cache} is on {kind}: let no other machine use this folder, its files could be corrupted"
        )
    return f"compile cache {cache} on {kind}"
