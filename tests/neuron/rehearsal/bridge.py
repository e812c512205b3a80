"""Carries torch_xla's collectives over gloo: its CPU client has none between processes.

Each rank is then a process with an XLA device of its own. Tensors, layers and optimizer are those of torch_xla; each
collective computes what was recorded before it, so this is for numbers, not for the number of graphs. `dist.barrier`
stays torch_xla's, which waits for nobody.
"""

import os

import torch
import torch.distributed as dist
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.distributed.xla_backend as xla_backend
import torch_xla.runtime as xr

RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
GROUPS = {}


def gloo_group(ranks):
    """The gloo group of this rank. ranks: a list of lists; nothing for all ranks."""
    ranks = ranks or [list(range(WORLD_SIZE))]
    if str(ranks) not in GROUPS:
        for each in ranks:
            group = xla_backend._orig_new_group_fn(list(each), backend="gloo")
            if RANK in each:
                GROUPS[str(ranks)] = group
    return GROUPS[str(ranks)]


def all_reduce(reduce_type, inputs, scale=1.0, groups=None, pin_layout=True):
    """One tensor: returns the sum. A list: sums in place."""
    single = isinstance(inputs, torch.Tensor)
    for tensor in [inputs] if single else inputs:
        value = tensor.detach().cpu().clone()
        dist.all_reduce(value, op=OPERATIONS[reduce_type], group=gloo_group(groups))
        value = (value * scale).to(tensor.dtype).to(tensor.device)
        if single:
            return value
        tensor.data.copy_(value)
    return inputs


def all_gather(value, dim=0, groups=None, output=None, pin_layout=True):
    group = gloo_group(groups)
    mine = value.detach().cpu().contiguous()
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    gathered = torch.cat(parts, dim=dim).to(value.device)
    return gathered if output is None else output.copy_(gathered)


def reduce_scatter(reduce_type, input, scale, scatter_dim, shard_count, groups=None, output=None, pin_layout=True):
    group = gloo_group(groups)
    summed = input.detach().cpu().contiguous().clone()
    dist.all_reduce(summed, op=OPERATIONS[reduce_type], group=group)
    part = (summed.chunk(shard_count, dim=scatter_dim)[dist.get_rank(group)] * scale).to(input.dtype)
    part = part.contiguous().to(input.device)
    return part if output is None else output.copy_(part)


def rendezvous(tag, payload=b"", replicas=()):
    torch_xla.sync()
    dist.barrier(group=gloo_group(None))
    return [b""] * WORLD_SIZE


def install():
    xr._WORLD_SIZE, xr._ORDINAL = WORLD_SIZE, RANK
    xr.world_size = xr.process_count = lambda: WORLD_SIZE
    xr.global_ordinal = xr.local_ordinal = lambda: RANK
    xm.all_reduce, xm.all_gather, xm.reduce_scatter, xm.rendezvous = all_reduce, all_gather, reduce_scatter, rendezvous
