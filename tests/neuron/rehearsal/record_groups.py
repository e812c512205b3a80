"""What each rank of a run takes itself for, from NxD's groups on torch_xla: python record_groups.py PARAMS FILE

Writes  FILE    JSON: for each rank, its place in its replica, the number of its replica, the ranks of the replica
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from neuronx_distributed.parallel_layers import parallel_state as state
from record_graphs import stand_for_all_ranks

from trnlora.backends.nxd_training import create_groups
from trnlora.params import load_params

params = load_params(Path(sys.argv[1]))
world_size = params.convert.tp_size * params.train.dp_size
ranks = []
for rank in range(world_size):
    stand_for_all_ranks(world_size, rank)
    mesh = create_groups(params)
    replica = next(group for group in state.get_tensor_model_parallel_replica_groups() if rank in group)
    ranks.append([mesh["tensor_parallel"].get_local_rank(), mesh["data_parallel"].get_local_rank(), replica])
    state.destroy_model_parallel()
    dist.destroy_process_group()
Path(sys.argv[2]).write_text(json.dumps(ranks), "utf-8")
