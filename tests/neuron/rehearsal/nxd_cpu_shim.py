"""Fake torch_xla / torch_neuronx / libneuronxla / neuronxcc / nki for running NxD python on CPU (gloo).
Import first.  PLATFORM env: NEURON_PLATFORM_TARGET_OVERRIDE (trn1|trn2).  Everything not listed is a MagicMock."""
import sys, os, types, importlib.abc, importlib.machinery
from unittest.mock import MagicMock
import torch
import torch.distributed as dist

ROOTS = ("torch_xla", "torch_neuronx", "libneuronxla", "neuronxcc", "nki", "nkilib")

class FakeModule(types.ModuleType):
    __path__ = []
    def __getattr__(self, n):
        if n.startswith("__"):
            raise AttributeError(n)
        m = MagicMock(name=self.__name__ + "." + n)
        setattr(self, n, m)
        return m

class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ROOTS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        return FakeModule(spec.name)
    def exec_module(self, m):
        fill(m)

def _groups_pg(groups):
    """list-of-lists -> cached gloo group of this rank"""
    if groups is None: return None
    if not isinstance(groups, (list, tuple)): return groups
    key = str(groups)
    if key not in _PG:
        me = dist.get_rank(); mine = None
        for g in groups:
            pg = dist.new_group(list(g), backend="gloo")
            if me in g: mine = pg
        _PG[key] = mine
    return _PG[key]
_PG = {}

def fill(m):
    n = m.__name__
    if n == "torch_xla":
        m.__version__ = "2.9.0"
    if n == "torch_xla.core.xla_model":
        m.REDUCE_SUM, m.REDUCE_MAX, m.REDUCE_MIN = "sum", "max", "min"
        m.rendezvous = lambda *a, **k: dist.barrier() if dist.is_initialized() else None
        m.mark_step = lambda *a, **k: None
        m.xla_device = lambda *a, **k: torch.device("cpu")
        m.is_master_ordinal = lambda local=True: (not dist.is_initialized()) or dist.get_rank() == 0
        m.master_print = lambda *a, **k: print(*a) if (not dist.is_initialized() or dist.get_rank() == 0) else None
        m.get_ordinal = lambda *a: dist.get_rank() if dist.is_initialized() else 0
        m.xrt_world_size = lambda *a: dist.get_world_size() if dist.is_initialized() else 1
        m.is_xla_tensor = lambda t: False
        def all_reduce(op, tensors, scale=1.0, groups=None, pin_layout=True, **k):
            pg = _groups_pg(groups)
            single = isinstance(tensors, torch.Tensor)
            outs = []
            for t in ([tensors] if single else tensors):
                t = t.contiguous()
                dist.all_reduce(t, group=pg); outs.append(t * scale)
            return outs[0] if single else outs
        m.all_reduce = all_reduce
        def all_gather(x, dim=0, groups=None, output=None, pin_layout=True, **k):
            pg = _groups_pg(groups)
            outs = [torch.empty_like(x) for _ in range(dist.get_world_size(group=pg))]
            dist.all_gather(outs, x.contiguous(), group=pg)
            return torch.cat(outs, dim=dim)
        m.all_gather = all_gather
        def reduce_scatter(op, x, scale, scatter_dim, shard_count, groups=None, output=None, pin_layout=True, **k):
            pg = _groups_pg(groups)
            x = x.contiguous().clone()
            dist.all_reduce(x, group=pg)
            part = x.chunk(shard_count, dim=scatter_dim)[dist.get_rank(pg)] * scale
            if output is None: return part
            output.copy_(part)
            return output
        m.reduce_scatter = reduce_scatter
        m.set_rng_state = lambda seed, device=None: torch.manual_seed(int(seed))
        class ToXlaTensorArena:
            def __init__(s, c, f): s.c, s.f = c, f
            def transform(s, d):
                found = []
                def walk(v):
                    if isinstance(v, dict): [walk(x) for x in v.values()]
                    elif isinstance(v, (list, tuple)): [walk(x) for x in v]
                    elif s.f(v): found.append(v)
                walk(d); new = list(s.c(found)) if found else []
                it = iter(new)
                def rep(v):
                    if isinstance(v, dict): return type(v)((k, rep(x)) for k, x in v.items())
                    if isinstance(v, (list, tuple)): return type(v)(rep(x) for x in v)
                    return next(it) if s.f(v) else v
                return rep(d)
        m.ToXlaTensorArena = ToXlaTensorArena
    if n == "torch_xla.core.xla_env_vars":
        m.HOST_WORLD_SIZE = "FAKE_HOST_WORLD_SIZE"; os.environ.setdefault("FAKE_HOST_WORLD_SIZE", "1")
    if n == "torch_xla.runtime":
        m.local_ordinal = lambda: int(os.environ.get("LOCAL_RANK", 0))
        m.global_ordinal = lambda: dist.get_rank() if dist.is_initialized() else 0
        m.world_size = lambda: dist.get_world_size() if dist.is_initialized() else 1
        m.local_device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        m.addressable_device_count = m.local_device_count
        m.local_process_count = m.local_device_count
        m.global_device_count = m.world_size
    if n == "torch_xla.utils.serialization":
        class TensorReference:
            def __init__(s, tid): s.tid = tid
        m.TensorReference = TensorReference
        m.save = lambda d, p, **k: torch.save(d, p)
    if n == "torch_xla.utils.checkpoint":
        import torch.utils.checkpoint as c
        m.checkpoint = c.checkpoint
    if n == "torch_xla.distributed.zero_redundancy_optimizer":
        m.ZeroRedundancyOptimizer = type("ZeroRedundancyOptimizer", (torch.optim.Optimizer,), {})
    if n == "torch_xla.distributed.parallel_loader":
        class MpDeviceLoader:
            def __init__(s, loader, device, **k): s._loader, s._device = loader, device
            def __iter__(s): return iter(s._loader)
            def __len__(s): return len(s._loader)
        m.MpDeviceLoader = MpDeviceLoader
    if n in ("torch_neuronx.utils", "torch_neuronx.utils.utils"):
        m.get_platform_target = lambda *a, **k: os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE", "trn2")
        m.SUPPORTED_TYPES = {}
    if n == "neuronxcc.nki._pre_prod_kernels.collectives" or n == "neuronxcc.nki._private_kernels.collectives":
        class CollectivesConfig:
            def __init__(s, replica_groups=None):
                s.replica_groups = replica_groups
                s.rank_src_tgt_pairs = {r: [] for g in replica_groups for r in g}
        m.CollectivesConfig = CollectivesConfig

sys.meta_path.insert(0, Finder())

def map_xla_to_cpu():
    """device='xla' -> cpu in torch.ones & Module.to/Tensor.to (the example's CoreAttention and LoraModel hard-code 'xla')."""
    def fix(v): return "cpu" if (isinstance(v, str) and v.startswith("xla")) else v
    for fn in ("ones", "zeros", "empty", "rand", "arange", "full", "tensor"):
        o = getattr(torch, fn)
        def w(*a, _o=o, **k):
            if "device" in k: k["device"] = fix(k["device"])
            return _o(*a, **k)
        setattr(torch, fn, w)
    mo = torch.nn.Module.to
    torch.nn.Module.to = lambda s, *a, **k: mo(s, *[fix(x) for x in a], **{q: fix(x) for q, x in k.items()})
    to = torch.Tensor.to
    torch.Tensor.to = lambda s, *a, **k: to(s, *[fix(x) for x in a], **{q: fix(x) for q, x in k.items()})

class _NS:
    def __getattr__(self, n):
        t = type(n, (), {}); setattr(self, n, t); return t
torch.classes.neuron = _NS()
