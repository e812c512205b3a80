"""The Python, the environment variables and the limits that a backend's training processes need. Imports no torch."""

from trnlora.backends import neuron_machine, nxd_environment
from trnlora.params import Params


def enter(params: Params, ranks_per_node: int, num_nodes: int, first_address: str) -> None:
    """Rerun this script in the environment of params.backend, if it needs another than the present one.

    first_address: of the first node, where all meet. Raises UserError when that environment is not usable, or when the
    ranks could not run on this machine.
    """
    if params.backend == "nxd":
        nxd_environment.rerun_in_neuron_environment(params, ranks_per_node, num_nodes, first_address)
        neuron_machine.prepare(params, ranks_per_node, num_nodes)


def ranks_may_be_forked(params: Params) -> bool:
    """Whether ranks may be forks of a process that has imported their libraries. torch_xla's runtime may not."""
    return not params.on_trainium
