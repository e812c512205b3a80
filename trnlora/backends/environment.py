"""The Python, the environment variables and the limits that a backend's training processes need. Imports no torch."""

import os

from trnlora.backends import neuron_environment, neuron_machine, nxd_environment
from trnlora.backends.python_environment import rerun, training_python
from trnlora.params import Params


def enter(params: Params, ranks_per_node: int, num_nodes: int, first_address: str) -> None:
    """Rerun this script in the environment of params.backend, if it needs another than the present one.

    first_address: of the first node, where all meet. Raises UserError when that environment is not usable, or when the
    ranks could not run on this machine.
    """
    if not params.on_trainium:
        return
    if params.backend == "nxd":
        env = nxd_environment.training_environment(params, ranks_per_node, num_nodes, first_address)
    else:
        neuron_environment.check_variables(ranks_per_node)
        env = neuron_environment.training_environment(params, num_nodes)
    rerun(training_python(params), env)
    neuron_machine.prepare(params, compile_cache(params), ranks_per_node, num_nodes)
    if params.backend == "neuron":
        os.environ.update(neuron_machine.pinning(ranks_per_node, params.neuron.logical_core_size))


def compile_cache(params: Params) -> str:
    """Where a Trainium backend keeps compiled graphs. Raises UserError if it cannot be where the params say."""
    own = nxd_environment if params.backend == "nxd" else neuron_environment
    return own.compile_cache(params)


def ranks_may_be_forked(params: Params) -> bool:
    """Whether ranks may be forks of a process that has imported their libraries.

    torch_xla's runtime may not. torch imports torch_neuronx by itself, whose runtime refuses to start in a fork of a
    process in which it has started ("Cannot re-initialize Neuron runtime in forked subprocess": torch_neuronx,
    __init__.py).
    """
    return not params.on_trainium
