"""LoRA fine-tuning of the sharded model with tensor parallelism.

    python stages/finetune_lora.py [--params FILE]                      starts dp_size × tp_size ranks on this machine,
                                                                        or its share of them, as one of several nodes
    torchrun --nproc_per_node N … stages/finetune_lora.py [--params …]  the same, with a rendezvous of your own
    python stages/finetune_lora.py --resume-from CHECKPOINT             from a checkpoint that other code has written

Several nodes: trnlora/training/cluster.py lists the environment variables, docs/scale.md how to start it. Each node
reads the inputs below; only the first one writes.

An interrupted run resumes from its last checkpoint in .scratch/checkpoints when it is started again with the same
inputs and params, and ends in the same bytes (trnlora/training/checkpoints.py).

Reads   artifacts/shards, artifacts/model/config.json, artifacts/prepared/{train,validation}.parquet
Writes  artifacts/lora_adapter/lora/model/dp_rank_00_tp_rank_RR_pp_rank_00.pt and adapter_config.json (NxD's paths),
        training.json beside them (the params and the digests of the inputs),
        metrics/finetune_lora.json, metrics/timing/finetune_lora.json, plots/training (DVCLive's curves; until the
        end they are in .scratch/curves, where those of a run that failed stay)
"""

import os
import sys
from pathlib import Path

from trnlora import paths
from trnlora.cli import add_params, script_parser
from trnlora.data.examples import read_prepared_with
from trnlora.errors import run
from trnlora.metrics import metrics_file, timing_file
from trnlora.model.config import ModelConfig
from trnlora.params import Params, load_params
from trnlora.training.adapter_record import check_foreign
from trnlora.training.launch import run_rank, start_ranks
from trnlora.weights.adapter_source import fetch_adapter
from trnlora.weights.nxd_layout import check_divisible, kv_replica_groups
from trnlora.weights.peft_folder import check_init_adapter

STAGE = "finetune_lora"
OUTPUTS = (*paths.TRAINING_OUTPUTS, metrics_file(STAGE), timing_file(STAGE))


def main() -> None:
    parser = script_parser(__doc__)
    add_params(parser)
    parser.add_argument(
        "--resume-from", type=Path, metavar="CHECKPOINT", help="a folder …/step_N of the same params and inputs"
    )
    args = parser.parse_args()
    if "RANK" in os.environ:  # torchrun has started this process
        run_rank(lambda: train(args.params, args.resume_from))
        # Everything is written. An ordinary exit can abort ("terminate called without an active exception") when
        # gloo's threads run into the interpreter's shutdown, which would fail a run that is complete.
        sys.stdout.flush()
        os._exit(0)
    params, config = read_params(args.params)
    if params.lora.init_adapter:
        folder = fetch_adapter(params.lora.init_adapter)
        check_init_adapter(folder, config, params.lora)
        check_foreign(folder, read_prepared_with(paths.PREPARED), "lora.init_adapter")
    start_ranks(params, train, args.params, args.resume_from, outputs=OUTPUTS, reads=paths.TRAINING_INPUTS)


def train(params_file: Path, resume_from: Path | None) -> None:
    """Train, as one rank of all."""
    from trnlora.training import run as training

    params, config = read_params(params_file)
    training.train(params, config, kv_replica_groups(config, params.convert), resume_from)


def read_params(file: Path) -> tuple[Params, ModelConfig]:
    """The params and the model's config. Raises UserError when the model cannot be cut, or not be trained, that way."""
    params = load_params(file)
    config = ModelConfig.from_folder(paths.MODEL)
    check_divisible(config, params.convert)
    kv_replica_groups(config, params.convert)
    return params, config


if __name__ == "__main__":
    run(main)
