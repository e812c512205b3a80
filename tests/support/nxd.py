"""The environments in which NxD runs here: with a stand-in for torch_xla, and with the real one on a CPU.

Neither is in requirements.lock; docs/trainium.md, "Run the rehearsals yourself", says how to get them. A test is
skipped without what it needs.
"""

import os

import pytest

from support import ROOT

REHEARSAL = ROOT / "tests/neuron/rehearsal"
XLA_PYTHON = ROOT / ".venv-xla/bin/python"


def _source() -> str:
    source = os.environ.get("NXD_SOURCE")
    if not source:
        pytest.skip("needs NxD's source: NXD_SOURCE=<clone>/src, see docs/trainium.md")
    return source


def stand_in_environment() -> dict[str, str]:
    """Environment variables with which a process of .venv imports the real NxD, on a stand-in for torch_xla.

    Skips the test without what this needs.
    """
    source, site = _source(), os.environ.get("NXD_SITE")
    if not site:
        pytest.skip("needs what NxD imports: NXD_SITE=<its packages>, see docs/trainium.md")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(REHEARSAL), source, site]),
        "NXD_CPU_MODE": "1",
        "NXD_LOG_LEVEL": "error",
        "OMP_NUM_THREADS": "1",
    }


def xla_environment() -> dict[str, str]:
    """Environment variables with which XLA_PYTHON imports the real NxD, on the real torch_xla and a CPU.

    Skips the test without what this needs.
    """
    source = _source()
    if not XLA_PYTHON.exists():
        pytest.skip("needs the real torch_xla: make setup-xla")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(REHEARSAL), source]),
        "PYTHONWARNINGS": "ignore",
        "PJRT_DEVICE": "CPU",
        "NXD_LOG_LEVEL": "error",
        "OMP_NUM_THREADS": "1",
    }
