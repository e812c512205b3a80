"""Makes NxD usable in every process of a rehearsal: Python imports this file at its start if it is on PYTHONPATH.

NXD_CPU_MODE=1 (of NxD): torch_xla is replaced as well. PJRT_DEVICE=CPU (of torch_xla): the real one, on a CPU, with
BRIDGE=gloo for several ranks.
"""

import os

if os.environ.get("NXD_CPU_MODE") == "1":
    import neuron_shim
    import xla_shim

    neuron_shim.install(xla_shim.MODULES)
    xla_shim.map_xla_to_cpu()
elif os.environ.get("PJRT_DEVICE") == "CPU":
    import neuron_shim
    import torch_xla.core.xla_env_vars  # before libneuronxla can be found, which torch_xla looks for

    # Where PJRT_DEVICE is not NEURON, NxD takes the number of hosts from a variable that an older torch_xla had
    # (parallel_layers/utils.py). torchrun has the number too.
    torch_xla.core.xla_env_vars.HOST_WORLD_SIZE = "GROUP_WORLD_SIZE"
    neuron_shim.install()
    if os.environ.get("BRIDGE") == "gloo" and "RANK" in os.environ:
        import bridge

        bridge.install()
