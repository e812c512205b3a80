"""Stands in for torch_xla: collectives use gloo, and the device is the CPU. What is not defined here is a MagicMock."""

import os

import torch
import torch.distributed as dist
import torch.utils.checkpoint


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


GROUPS = {}


def group_of(ranks):
    """The gloo group of this rank. ranks: a list of lists, or already a group, or None for all ranks."""
    if not isinstance(ranks, list | tuple):
        return ranks
    if str(ranks) not in GROUPS:
        groups = [dist.new_group(list(each), backend="gloo") for each in ranks]
        GROUPS[str(ranks)] = next(group for group, each in zip(groups, ranks, strict=True) if dist.get_rank() in each)
    return GROUPS[str(ranks)]


def all_reduce(op, tensors, scale=1.0, groups=None, pin_layout=True):
    single = isinstance(tensors, torch.Tensor)
    reduced = []
    for tensor in [tensors] if single else tensors:
        value = tensor.contiguous()
        dist.all_reduce(value, group=group_of(groups))
        if not single:
            tensor.copy_(value)
        reduced.append(value * scale)
    return reduced[0] if single else reduced


def all_gather(tensor, dim=0, groups=None, output=None, pin_layout=True):
    group = group_of(groups)
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def reduce_scatter(op, tensor, scale, scatter_dim, shard_count, groups=None, output=None, pin_layout=True):
    group = group_of(groups)
    tensor = tensor.contiguous().clone()
    dist.all_reduce(tensor, group=group)
    part = tensor.chunk(shard_count, dim=scatter_dim)[dist.get_rank(group)] * scale
    return part if output is None else output.copy_(part)


class ToXlaTensorArena:
    """Converts the tensors in nested containers together."""

    def __init__(self, convert, select):
        self.convert, self.select = convert, select

    def transform(self, data):
        found = []

        def collect(value):
            if isinstance(value, dict | list | tuple):
                for each in value.values() if isinstance(value, dict) else value:
                    collect(each)
            elif self.select(value):
                found.append(value)

        collect(data)
        converted = iter(self.convert(found) if found else [])

        def replace(value):
            if isinstance(value, dict):
                return type(value)((key, replace(each)) for key, each in value.items())
            if isinstance(value, list | tuple):
                return type(value)(replace(each) for each in value)
            return next(converted) if self.select(value) else value

        return replace(data)


class TensorReference:
    def __init__(self, tid):
        self.tid = tid


class MpDeviceLoader:
    def __init__(self, loader, device):
        self._loader, self._device = loader, device

    def __iter__(self):
        return iter(self._loader)

    def __len__(self):
        return len(self._loader)


def local_device_count():
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


os.environ.setdefault("FAKE_HOST_WORLD_SIZE", "1")
MODULES = {
    "torch_xla": {"__version__": "2.9.0"},
    "torch_xla.core.xla_model": {
        "REDUCE_SUM": "sum",
        "REDUCE_MAX": "max",
        "REDUCE_MIN": "min",
        "rendezvous": lambda *unused: dist.barrier() if dist.is_initialized() else None,
        "mark_step": lambda *unused, **unused_too: None,
        "xla_device": lambda *unused: torch.device("cpu"),
        "is_master_ordinal": lambda local=True: rank() == 0,
        "master_print": lambda *text: print(*text) if rank() == 0 else None,
        "get_ordinal": rank,
        "xrt_world_size": world_size,
        "is_xla_tensor": lambda tensor: False,
        "all_reduce": all_reduce,
        "all_gather": all_gather,
        "reduce_scatter": reduce_scatter,
        "set_rng_state": lambda seed, device=None: torch.manual_seed(int(seed)),
        "ToXlaTensorArena": ToXlaTensorArena,
    },
    "torch_xla.core.xla_env_vars": {"HOST_WORLD_SIZE": "FAKE_HOST_WORLD_SIZE"},
    "torch_xla.runtime": {
        "local_ordinal": lambda: int(os.environ.get("LOCAL_RANK", 0)),
        "global_ordinal": rank,
        "world_size": world_size,
        "local_device_count": local_device_count,
        "addressable_device_count": local_device_count,
        "local_process_count": local_device_count,
        "global_device_count": world_size,
    },
    "torch_xla.utils.serialization": {
        "TensorReference": TensorReference,
        "save": lambda data, path, **unused: torch.save(data, path),
    },
    "torch_xla.utils.checkpoint": {"checkpoint": torch.utils.checkpoint.checkpoint},
    "torch_xla.distributed.zero_redundancy_optimizer": {
        "ZeroRedundancyOptimizer": type("ZeroRedundancyOptimizer", (torch.optim.Optimizer,), {}),
    },
    "torch_xla.distributed.parallel_loader": {"MpDeviceLoader": MpDeviceLoader},
}


def map_xla_to_cpu():
    """Let Module.to("xla") mean the CPU: LoraModel hard-codes the device."""
    to = torch.nn.Module.to
    torch.nn.Module.to = lambda module, *args, **kwargs: to(
        module, *["cpu" if arg == "xla" else arg for arg in args], **kwargs
    )
