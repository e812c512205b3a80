"""Train a tiny model for ten steps on the CPU and on the active backend, and compare: the first thing on a new machine.

    python tools/device_check.py [--params FILE | --profile NAME]        (make device-check)

With the ranks, the cut and the LoRA targets of the params, in float32 and in bfloat16. Prints the largest differences
of logits, losses, gradients and adapters of each rank, and exits with 1 if one is beyond its tolerance. With backend
cpu or cuda, the other side is the static form that Trainium's compiler gets, on the CPU.

Writes  .scratch/device-check: shards, and what each rank of both sides computed
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from trnlora.cli import add_params_or_profile, chosen_params, script_parser
from trnlora.errors import UserError, run
from trnlora.files import locked
from trnlora.params import Params
from trnlora.training.launch import run_rank, start_ranks

SCRATCH = Path(".scratch/device-check")


def main() -> None:
    parser = script_parser(__doc__)
    add_params_or_profile(parser)
    parser.add_argument("--side", nargs=2, metavar=("SIDE", "DTYPE"), help="train one side only, into its folder")
    args = parser.parse_args()
    params = chosen_params(args)
    if args.side is None:
        with locked(SCRATCH):
            check(params)
    elif "RANK" in os.environ:
        run_rank(lambda: train(params, *args.side))
        sys.stdout.flush()
        os._exit(0)  # as stages/finetune_lora.py
    else:
        train_params = params.train.model_copy(update={"loggers": []})  # they would have to be installed
        backend = "cpu" if args.side[0] == "cpu" else params.backend
        start_ranks(params.model_copy(update={"backend": backend, "train": train_params}), train, params, *args.side)


def train(params: Params, side: str, dtype: str) -> None:
    """Train one side, as one rank of all."""
    from trnlora.training.device_check import train_side

    train_side(params, side, dtype, SCRATCH / dtype)


def check(params: Params) -> None:
    from rich.console import Console

    from trnlora.training.device_check import (
        SIDES,
        STEPS,
        TOLERANCES,
        Difference,
        compare,
        difference_table,
        write_tiny_shards,
    )

    names = dict(zip(SIDES, ("cpu", params.backend if params.on_trainium else "static form"), strict=True))
    shutil.rmtree(SCRATCH, ignore_errors=True)
    differences: list[Difference] = []
    for dtype in TOLERANCES:
        write_tiny_shards(SCRATCH / dtype, params, dtype)
        for side in reversed(SIDES):  # first the one that may not run
            (SCRATCH / dtype / side).mkdir()
            print(f"training {STEPS} steps in {dtype}: {names[side]}", flush=True)
            command = [sys.executable, *sys.argv, "--side", side, dtype]
            if subprocess.run(command, check=False).returncode:
                raise UserError(f"{names[side]} did not train: see the lines above")
        differences += compare(SCRATCH / dtype, dtype)
    Console().print(difference_table(differences))
    wrong = [difference for difference in differences if difference.is_too_large]
    if wrong:
        first = wrong[0]
        raise UserError(
            f"{names['device']} differs from the CPU: {first.what} of rank {first.rank} in {first.dtype} by "
            f"{first.value:.1e}, allowed are {first.tolerance:.0e} ({first.where or 'before the first step'}; "
            f"{len(wrong)} of {len(differences)} comparisons): do not train on it; the records are in {SCRATCH}"
        )


if __name__ == "__main__":
    run(main)
