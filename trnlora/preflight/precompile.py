"""neuron_parallel_compile on the training stage: the graphs of a run compiled before the run."""

import math
import os
import shutil
import subprocess
from pathlib import Path

import psutil

from trnlora import paths
from trnlora.backends.nxd_environment import training_environment
from trnlora.backends.python_environment import training_python
from trnlora.errors import UserError
from trnlora.files import locked
from trnlora.params import Params
from trnlora.preflight.plan import GIB
from trnlora.readers import write_yaml

SCRATCH = Path(".scratch/precompile")
STEPS = 5  # the first steps of an optimizer differ from later ones
# Host memory of one neuronx-cc, in GiB per 1,024 tokens of a micro-batch. An estimate, as AWS gives no figure: for a
# step of an 8B model over four cores, a host of 124 GiB sufficed for 8,192 tokens and not for 16,384 (read:
# alpharomercoma/torchneuronx, trn2/results). A larger tp_size gives smaller graphs.
GIB_PER_1024_TOKENS = 8.0
CORES_PER_COMPILER = 4  # of the host; an estimate


def compile_command(params: Params) -> tuple[list[str], dict[str, str]]:
    """The command, to be run in SCRATCH, and its environment variables. Raises UserError unless backend is nxd."""
    if params.backend == "neuron":
        # torch-neuronx has a compile-only mode (aws-neuron-sdk, torch/compile/about-torch-compile.rst), which computes
        # nothing. What a training that reads its losses does in it is not documented.
        raise UserError(
            "backend neuron compiles a graph when it is first run and keeps it in neuron.compile_cache: there is "
            "nothing to compile ahead, start the training"
        )
    if params.backend != "nxd":
        raise UserError(f"backend {params.backend} compiles nothing; `make profile NAME=llama3-8b-trn2-nxd` does")
    python = Path(training_python(params))
    env = training_environment(params, params.convert.tp_size * params.train.dp_size)
    env["NEURON_PARALLEL_COMPILE_MAX_RETRIES"] = "1"
    tool = [str(python.with_name("neuron_parallel_compile")), "--num_parallel", str(parallel_compilers(params))]
    return [*tool, str(python), "-u", str(Path("stages/finetune_lora.py").absolute())], env


def compiler_gib(params: Params) -> float:
    """Estimated host memory of one compiler process, in GiB."""
    return GIB_PER_1024_TOKENS * params.train.micro_batch_size * params.data.seq_len / 1024


def available_gib() -> float:
    """Memory of this machine that programs can still get, in GiB."""
    return float(psutil.virtual_memory().available / GIB)


def parallel_compilers(params: Params) -> int:
    """How many compilers this machine's available memory and cores allow at a time; at least one.

    The option --num_parallel is used in aws-neuron-samples, torch-neuronx/training/stable_diffusion/run.py.
    """
    cores = len(os.sched_getaffinity(0)) // CORES_PER_COMPILER
    return max(1, min(int(available_gib() // compiler_gib(params)), cores))


def precompile(params: Params) -> None:
    """Run the command on a few steps of the real run. Raises UserError if it cannot start or a graph fails."""
    command, env = compile_command(params)
    if not Path(command[0]).exists():
        raise UserError(f"{command[0]} is missing: neuron.python must be the Python of a Neuron training environment")
    with locked(SCRATCH):
        write_trial(params)
        print(
            f"compiling at most {parallel_compilers(params)} graphs at a time: {available_gib():.0f} GiB of memory "
            f"available, about {compiler_gib(params):.0f} per compiler, {len(os.sched_getaffinity(0))} cores",
            flush=True,
        )
        done = subprocess.run(command, cwd=SCRATCH, env={**os.environ, **env}, check=False)
    if done.returncode:
        raise UserError(
            f"neuron_parallel_compile ended with exit code {done.returncode}: the lines above name the graphs that "
            "failed; run `make precompile` again, compiled graphs are kept (if a compiler was killed and no other "
            f"process uses the cache, `{command[0]} --command clear-locks` removes its locks first)"
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
    write_yaml(trial, SCRATCH / paths.PARAMS)
