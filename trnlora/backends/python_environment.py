"""The Python that trains on Trainium: which one, what it has installed, and running this script again with it.

Imports neither torch nor a Neuron package.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from trnlora.errors import UserError
from trnlora.params import Params

RERUN_WITH = "TRNLORA_RERUN_WITH"  # in a process that `rerun` has started: its Python

_ASK = """
import importlib.metadata as m, json, platform, sys
def version(name):
    if name == "python": return platform.python_version()
    try: return m.version(name)
    except m.PackageNotFoundError: return None
print(json.dumps({name: version(name) for name in sys.argv[1:]}))
"""


def installed(python: str, packages: tuple[str, ...]) -> dict[str, str | None] | None:
    """Versions of packages in another Python's environment; None for a missing one. None if it cannot run.

    "python" among the packages is the interpreter itself.
    """
    try:
        done = subprocess.run([python, "-c", _ASK, *packages], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    versions: dict[str, str | None] = json.loads(done.stdout)
    return versions


def training_python(params: Params) -> str:
    """The absolute path of the training processes' Python. A link is not followed: a virtual environment's is one."""
    return str(Path(params.neuron.python or sys.executable).absolute())


def with_own_bin(python: str, path: str) -> str:
    """The search path `path` with the folder of `python` first, unchanged if it is first already.

    A link is not followed: the programs of a virtual environment are next to the link.
    """
    folder = str(Path(python).absolute().parent)
    if path.split(os.pathsep)[0] == folder:
        return path
    return os.pathsep.join(filter(None, [folder, path]))


def process_environment(python: str, variables: Mapping[str, str]) -> dict[str, str]:
    """`variables` for a process of `python`, with PATH and PYTHONPATH, which get a folder in front.

    Variables that the user has set keep their values.
    """
    env = {name: os.environ.get(name, value) for name, value in variables.items()}
    env["PATH"] = with_own_bin(python, os.environ.get("PATH", ""))
    # The stages import this project, which need not be installed in the Neuron environment.
    root, given = str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")
    if root not in given.split(os.pathsep):
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, given]))
    return env


def rerun(python: str, env: Mapping[str, str]) -> None:
    """Replace this process by the same command with another Python and these environment variables.

    Once: the new process is recognized by RERUN_WITH, not by its interpreter, which a neuron.python that only starts
    another one, such as pyenv's, would never equal. Raises UserError when `python` is not an executable file.
    """
    if os.environ.get(RERUN_WITH) == python:
        return
    if not os.access(python, os.X_OK):
        raise UserError(
            f"neuron.python {python} is not an executable Python interpreter: name that of your Neuron environment in "
            "params.yaml"
        )
    sys.stdout.flush()
    os.execve(python, [python, "-u", *sys.argv], {**os.environ, **env, RERUN_WITH: python})
