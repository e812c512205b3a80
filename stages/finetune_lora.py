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
        metrics/finetune_lora.json, metrics/timing/finetune_lora.json, plots/training (DVCLive's curves)
"""

import os
from pathlib import Path

from trnlora import paths
from trnlora.cli import add_params, script_parser
from trnlora.errors import run
from trnlora.model.config import ModelConfig
from trnlora.params import load_params
from trnlora.training.launch import run_rank, start_ranks
from trnlora.weights.nxd_layout import check_divisible, kv_replica_groups


def main() -> None:
    parser = script_parser(__doc__)
    add_params(parser)
    parser.add_argument(
        "--resume-from", type=Path, metavar="CHECKPOINT", help="a folder …/step_N of the same params and inputs"
    )
    args = parser.parse_args()
    params = load_params(args.params)
    config = ModelConfig.from_folder(paths.MODEL)
    check_divisible(config, params.convert)
    kv_groups = kv_replica_groups(config, params.convert)
    if "RANK" not in os.environ:
        start_ranks(params)  # each rank runs this script again
        return

    from trnlora.training.run import train

    train(params, config, kv_groups, args.resume_from)


if __name__ == "__main__":
    if "RANK" in os.environ:
        run_rank(main)
    else:
        run(main)
