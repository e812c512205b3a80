"""neuron_parallel_compile on the training stage: the graphs of a run compiled before the run."""

import math
import os
import shutil
import subprocess
from pathlib import Path

import yaml

from trnlora import paths
from trnlora.backends.nxd_environment import training_environment, training_python
from trnlora.errors import UserError
from trnlora.params import Params

SCRATCH = Path(".scratch/precompile")
STEPS = 5  # the first steps of an optimizer differ from later ones


def compile_command(params: Params) -> tuple[list[str], dict[str, str]]:
    """The command, to be run in SCRATCH, and its environment variables. Raises UserError for cpu and cuda."""
    if params.backend != "nxd":
        raise UserError(f"backend {params.backend} compiles nothing; `make profile NAME=llama3-8b-trn2-nxd` does")
    python = Path(training_python(params))
    env = training_environment(params, params.convert.tp_size * params.train.dp_size) | {
        "NEURON_CC_FLAGS": f"{params.neuron.cc_flags} --retry_failed_compilation",
        "NEURON_PARALLEL_COMPILE_MAX_RETRIES": "1",
    }
    tool = python.with_name("neuron_parallel_compile")
    return [str(tool), str(python), "-u", str(Path("stages/finetune_lora.py").absolute())], env


def precompile(params: Params) -> None:
    """Run the command on a few steps of the real run. Raises UserError if it cannot start or a graph fails."""
    command, env = compile_command(params)
    if not Path(command[0]).exists():
        raise UserError(f"{command[0]} is missing: neuron.python must be the Python of a Neuron training environment")
    write_trial(params)
    done = subprocess.run(command, cwd=SCRATCH, env={**os.environ, **env}, check=False)
    if done.returncode:
        raise UserError(
            f"neuron_parallel_compile ended with exit code {done.returncode}: the lines above name the graphs that "
            "failed; run `make precompile` again, compiled graphs are kept"
        )


def write_trial(params: Params) -> None:
    """Make SCRATCH: links to the real run's inputs, and its params with at most STEPS steps."""
    inputs = (paths.MODEL, paths.PREPARED, paths.SHARDS)
    for folder in inputs:
        if not folder.exists():
            raise UserError(f"{folder} is missing: run `dvc repro prepare_data convert_nxd` first")
    shutil.rmtree(SCRATCH, ignore_errors=True)
    (SCRATCH / "artifacts").mkdir(parents=True)
    for folder in inputs:
        (SCRATCH / folder).symlink_to(folder.absolute())
    trial = params.model_dump()
    trial["train"]["max_steps"] = min(STEPS, params.train.max_steps or math.inf)
    trial["train"] |= {"keep": "last", "early_stopping_patience": None, "loggers": []}  # its losses mean nothing
    (SCRATCH / "params.yaml").write_text(yaml.safe_dump(trial, sort_keys=False), encoding="utf-8")
