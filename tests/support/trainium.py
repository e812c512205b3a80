"""A Trainium machine as the tests need it: stubs that print what AWS documents of its programs, and profiles."""

import json
from pathlib import Path
from typing import Any

from support import ROOT
from trnlora.params import Params
from trnlora.profiles import load_profile

BENCH = {"pid": 113985, "command": "neuron-bench exec --run-as-cc-neff --...", "neuron_runtime_version": "2.0.0"}


def profile(name: str, **sections: dict[str, Any]) -> Params:
    """A profile with some of its keys changed."""
    params = load_profile(name, ROOT / "profiles")
    changed = {section: getattr(params, section).model_copy(update=values) for section, values in sections.items()}
    return params.model_copy(update=changed)


def executable(path: Path, script: str) -> Path:
    """A shell script that can be run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n", "utf-8")
    path.chmod(0o755)
    return path


def device(number: int, processes: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """A device of a trn2.48xlarge.

    Keys of the example in aws-neuron-sdk, tools/neuron-sys-tools/neuron-ls.rst; processors and NUMA nodes of the table
    in neuron-runtime/explore/runtime-performance-tips.rst.
    """
    node = 0 if 4 <= number < 12 else 1
    return {
        "neuron_device": number, "bdf": "cc:00.0", "cpu_affinity": ("0-47,96-143", "48-95,144-191")[node],
        "numa_node": str(node), "connected_to": [12, 3, 4, 1], "nc_count": 4, "logical_neuroncore_config": 2,
        "memory_size": 103079215104, "neuroncore_ids": [4 * number + core for core in range(4)],
        "neuron_processes": processes or [],
    }  # fmt: skip


def install_neuron_ls(folder: Path, devices: Any, instance: str = "trn2.48xlarge") -> None:
    """A neuron-ls in `folder` that prints the devices as JSON, and without an option a text that names the instance."""
    (folder / "devices.json").write_text(json.dumps(devices), "utf-8")
    text = f"instance-type: {instance}\ninstance-id: i-aabbccdd123456789\nlogical-neuroncore-config: 2"
    executable(folder / "neuron-ls", f'[ "$1" = --json-output ] && exec cat {folder}/devices.json\necho "{text}"')
