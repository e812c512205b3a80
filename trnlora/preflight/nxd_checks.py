"""The checks of `make doctor` for backend nxd: NxD's environment, its driver, and memory for its compilers."""

import os
from collections.abc import Callable, Iterator
from functools import partial

from trnlora import requirements
from trnlora.backends import neuron_machine, nxd_environment
from trnlora.backends.python_environment import installed, training_python
from trnlora.params import Params
from trnlora.preflight.caution import Caution
from trnlora.preflight.known_models import weights_gib
from trnlora.preflight.machine_checks import (
    check_nothing_missing,
    machine_checks,
    missing_hardware,
    missing_packages,
    missing_programs,
    unusable_python,
)
from trnlora.preflight.precompile import available_gib, compiler_gib, parallel_compilers

PACKAGES = ("torch-neuronx", "neuronx-distributed", "neuronx-cc")  # the machine image's


def nxd_checks(params: Params) -> Iterator[Callable[[], str]]:
    """The checks for params of backend nxd."""
    yield partial(check_nxd, params)
    if neuron_machine.DRIVER.exists():
        yield partial(check_driver, params)
    yield from machine_checks(params)
    yield partial(check_compiler_memory, params)


def check_nxd(params: Params) -> str:
    """Driver, number of cores and training environment of a Trainium machine; all that is missing in one line."""
    missing = [*missing_hardware(params), *_missing_in_environment(params), *_forced_dtypes()]
    return check_nothing_missing(params, missing)


def _missing_in_environment(params: Params) -> Iterator[str]:
    """Packages of the training environment: AWS's, and those of pyproject.toml's group neuron."""
    python = training_python(params)
    found = installed(python, (*PACKAGES, *requirements.group("neuron")))
    if found is None:
        yield unusable_python(python)
        return
    yield from missing_packages(python, found, "docs/trainium.md has the commands")
    yield from missing_programs(python, nxd_environment.PROGRAMS)
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
    found = installed(training_python(params), ("neuronx-cc",)) or {}
    compiler = found.get("neuronx-cc")
    sdk = nxd_environment.sdk_of(compiler) if compiler else None
    if sdk is None:
        return Caution(
            f"Neuron driver {driver}; neuronx-cc {compiler or 'is missing'}, so it is not known whether they fit"
        )
    nxd_environment.check_driver(driver, sdk)
    return f"Neuron driver {driver} and neuronx-cc {compiler} fit (SDK {sdk.name}, released with driver {sdk.driver})"


def check_compiler_memory(params: Params) -> str:
    """Host memory for the compilers. What one needs is an estimate, so too little is no failure."""
    available, each, weights = available_gib(), compiler_gib(params), weights_gib(params) or 0.0
    if available < each + weights:
        return Caution(
            f"{available:.0f} GiB of memory available may be too little to compile (about {each:.0f} per compiler, "
            f"{weights:.0f} for weights): if neuronx-cc ends with -9, lower data.seq_len or take a larger instance"
        )
    return f"memory for {parallel_compilers(params)} compilers of about {each:.0f} GiB at a time"
