"""Compile the graphs of a Trainium training run ahead of it, in parallel, into neuron.compile_cache.

    python tools/precompile.py [--params FILE | --profile NAME] [--dry-run]      (make precompile)

Runs stages/finetune_lora.py for a few steps under neuron_parallel_compile, which extracts the graphs without computing
anything, and compiles them. Params, data and shards are the real run's, so the real run finds the same graphs; what
the trial writes stays in .scratch/precompile. Graphs whose compilation failed before are tried again.
"""

import argparse
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from trnlora import paths
from trnlora.backends.nxd_environment import training_environment
from trnlora.errors import UserError, run
from trnlora.profiles import add_params_arguments, chosen_params

SCRATCH = Path(".scratch/precompile")
STEPS = 5  # an optimizer's first steps differ from the later ones


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_params_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the command and its environment, start nothing")
    args = parser.parse_args()
    params = chosen_params(args)
    if params.backend != "nxd":
        raise UserError(f"backend {params.backend} compiles nothing: `make profile NAME=llama3-8b-trn2` has nxd")
    python = Path(params.neuron.python or sys.executable)
    tool = python.with_name("neuron_parallel_compile")
    env = training_environment(params, params.convert.tp_size * params.train.dp_size) | {
        "NEURON_CC_FLAGS": f"{params.neuron.cc_flags} --retry_failed_compilation",
        "NEURON_PARALLEL_COMPILE_MAX_RETRIES": "1",
    }
    command = [str(tool), str(python), "-u", str(Path("stages/finetune_lora.py").absolute())]
    if args.dry_run:
        print(" ".join(f"{name}={shlex.quote(value)}" for name, value in env.items()))
        print(f"(in {SCRATCH}) {shlex.join(command)}")
        return
    if not tool.exists():
        raise UserError(f"{tool} is missing: neuron.python must be the Python of a Neuron training environment")
    for folder in (paths.MODEL, paths.PREPARED, paths.SHARDS):
        if not folder.exists():
            raise UserError(f"{folder} is missing: run `dvc repro prepare_data convert_nxd` first")

    shutil.rmtree(SCRATCH, ignore_errors=True)
    (SCRATCH / "artifacts").mkdir(parents=True)
    for folder in (paths.MODEL, paths.PREPARED, paths.SHARDS):
        (SCRATCH / folder).symlink_to(folder.absolute())
    trial = params.model_dump()
    trial["train"]["max_steps"] = min(STEPS, params.train.max_steps or math.inf)
    (SCRATCH / "params.yaml").write_text(yaml.safe_dump(trial, sort_keys=False), encoding="utf-8")
    done = subprocess.run(command, cwd=SCRATCH, env={**os.environ, **env}, check=False)
    if done.returncode:
        raise UserError(
            f"neuron_parallel_compile ended with {done.returncode}: its lines above name the graphs that failed; run "
            "`make precompile` again, compiled graphs are kept"
        )
    print(f"compiled into {params.neuron.compile_cache}")


if __name__ == "__main__":
    run(main)
