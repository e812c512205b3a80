"""The rehearsal: the real NxD, on a CPU. NxD itself is not installed by requirements.lock and is not in this project.

    git clone https://github.com/aws-neuron/neuronx-distributed nxd              (fbac349, Neuron SDK 2.29, was used)
    pip install --no-deps --target nxd-site boto3 botocore s3transfer jmespath tenacity \\
        transformers==4.48.0 tokenizers==0.21.4 huggingface-hub==0.36.0
    NXD_SOURCE=$PWD/nxd/src NXD_SITE=$PWD/nxd-site .venv/bin/pytest tests/neuron
"""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REHEARSAL = Path(__file__).parent / "rehearsal"


@pytest.fixture(scope="session")
def nxd_environment() -> dict[str, str]:
    """Environment variables with which a process imports the real NxD, on a CPU."""
    source, site = os.environ.get("NXD_SOURCE"), os.environ.get("NXD_SITE")
    if not source or not site:
        pytest.skip("needs NxD's source: NXD_SOURCE=<clone>/src NXD_SITE=<its packages>, see tests/neuron/conftest.py")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(REHEARSAL), source, site]),
        "NXD_CPU_MODE": "1",
        "NXD_LOG_LEVEL": "error",
        "OMP_NUM_THREADS": "1",
    }
