"""The checks of `make doctor` for backend neuron: native PyTorch, its driver, its machine."""

import platform
from collections.abc import Callable, Iterator
from functools import partial

from trnlora import requirements
from trnlora.backends import neuron_environment, neuron_machine
from trnlora.backends.python_environment import installed, training_python
from trnlora.errors import UserError
from trnlora.params import Params
from trnlora.preflight.caution import Caution
from trnlora.preflight.machine_checks import (
    check_nothing_missing,
    machine_checks,
    missing_hardware,
    missing_packages,
    missing_programs,
    ranks_per_node,
    unusable_python,
)

# Those that AWS installs together. Source: aws-neuron-sdk, setup/pytorch/update-manual.rst.
PACKAGES = ("torch", "torch-neuronx", "neuronx-cc", "nki")


def neuron_checks(params: Params) -> Iterator[Callable[[], str]]:
    """The checks for params of backend neuron."""
    yield partial(check_neuron, params)
    yield check_system
    if neuron_machine.DRIVER.exists():
        yield partial(check_driver, params)
        yield partial(check_pinning, params)
    yield from machine_checks(params)


def check_neuron(params: Params) -> str:
    """Driver, instance, cores and training environment of a Trainium machine; all that is missing in one line."""
    missing = [*missing_hardware(params), *_missing_generation(), *_missing_in_environment(params)]
    try:
        neuron_environment.check_variables(ranks_per_node(params))
    except UserError as error:
        missing.append(f"a core for each rank: {error}")
    return check_nothing_missing(params, missing)


def _missing_generation() -> Iterator[str]:
    instance = neuron_machine.instance_type()
    if instance and not instance.startswith(neuron_environment.INSTANCES):
        yield f"a Trn2 or Trn3 (this is a {instance}: backend nxd trains on Trn1)"


def _missing_in_environment(params: Params) -> Iterator[str]:
    """Packages of the training environment: AWS's, and those of pyproject.toml's group neuron."""
    python = training_python(params)
    found = installed(python, ("python", *PACKAGES, *requirements.group("neuron")))
    if found is None:
        yield unusable_python(python)
        return
    remedy = "docs/trainium.md has the commands" if params.neuron.python else "`make setup-neuron` installs them"
    yield from missing_packages(python, found, remedy)
    if found["neuronx-cc"]:
        yield from missing_programs(python, neuron_environment.PROGRAMS)
    yield from neuron_environment.check_packages(found)


def check_system() -> str:
    """Whether AWS supports native PyTorch on this Linux; others may work."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    name = release.get("PRETTY_NAME", "this system")
    supported = " and ".join(neuron_environment.UBUNTU)
    if release.get("ID") != "ubuntu" or release.get("VERSION_ID") not in neuron_environment.UBUNTU:
        return Caution(f"{name}: AWS supports native PyTorch on Ubuntu {supported}")
    return name


def check_driver(params: Params) -> str:
    """The driver against the one with which the SDK of the training environment was released."""
    driver = neuron_machine.DRIVER.read_text("utf-8").strip()
    compiler = (installed(training_python(params), ("neuronx-cc",)) or {}).get("neuronx-cc")
    sdk = neuron_environment.sdk_of(compiler) if compiler else None
    if sdk is None:
        return Caution(
            f"Neuron driver {driver}; neuronx-cc {compiler or 'is missing'}, so it is not known whether they fit"
        )
    if neuron_environment.number(driver) < neuron_environment.number(sdk.driver):
        # AWS's rule: a newer driver serves an older runtime, and a newer runtime may need a newer driver
        # (aws-neuron-sdk, neuron-runtime/nrt-troubleshoot.rst). Which older ones do is not documented for these SDKs.
        return Caution(
            f"Neuron driver {driver} is older than that of SDK {sdk.name}: if the runtime does not start, install the "
            f"release's (sudo apt-get install aws-neuronx-dkms={sdk.driver}*), stop all processes on the devices and "
            "reload it (sudo rmmod neuron && sudo modprobe neuron)"
        )
    return f"Neuron driver {driver} and neuronx-cc {compiler} fit (SDK {sdk.name}, released with driver {sdk.driver})"


def check_pinning(params: Params) -> str:
    """Whether neuron-ls says which of the host's processors are beside each rank's device."""
    lists = neuron_machine.cpus_of_ranks(
        neuron_machine.devices() or [], ranks_per_node(params), params.neuron.logical_core_size
    )
    if not lists:
        return Caution("neuron-ls names no processors beside the devices, so ranks are not pinned to them")
    return "ranks are pinned to the processors beside their devices: " + " and ".join(dict.fromkeys(lists))
