"""Installs the shim in every process of a rehearsal: Python imports this file at its start if it is on PYTHONPATH."""

import os

if os.environ.get("NXD_CPU_MODE") == "1":
    import nxd_cpu_shim

    nxd_cpu_shim.map_xla_to_cpu()
