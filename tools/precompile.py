"""Compile the graphs of a Trainium training run before the run, in parallel, into neuron.compile_cache.

    python tools/precompile.py [--params FILE | --profile NAME] [--dry-run]      (make precompile)

Runs a few steps of stages/finetune_lora.py under neuron_parallel_compile, which extracts the graphs without computing
anything, then compiles them. Params, data and shards are those of the real run, so the real run finds the same graphs.
Graphs that failed to compile before are tried again.

Reads   artifacts/model, artifacts/prepared, artifacts/shards
Writes  neuron.compile_cache; .scratch/precompile, what the trial leaves
"""

import shlex

from trnlora.cli import add_params_or_profile, chosen_params, script_parser
from trnlora.errors import run
from trnlora.preflight.precompile import SCRATCH, compile_command, precompile


def main() -> None:
    parser = script_parser(__doc__)
    add_params_or_profile(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the command and its environment, start nothing")
    args = parser.parse_args()
    params = chosen_params(args)
    if args.dry_run:
        command, env = compile_command(params)
        print(" ".join(f"{name}={shlex.quote(value)}" for name, value in env.items()))
        print(f"(in {SCRATCH}) {shlex.join(command)}")
        return
    precompile(params)
    print(f"compiled into {params.neuron.compile_cache}")


if __name__ == "__main__":
    run(main)
