"""NxD's parallel layers on torch.distributed: gloo on a CPU, nccl on a GPU.

Each layer has NxD's parameter names and shard shapes (neuronx_distributed/parallel_layers/layers.py,
modules/qkv_linear.py). Weights are created empty and filled from shard files.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from trnlora.backends.document_attention import Documents, attention_within_documents
from trnlora.backends.frozen_linear import FrozenWeights, frozen_linear, lora_linear
from trnlora.backends.mkl import settle_vector_math
from trnlora.backends.shared_memory import SharedMemory, connect
from trnlora.model import fused_ops
from trnlora.model.config import LOSS_CHUNK
from trnlora.model.decoder import IGNORED
from trnlora.model.needed_tokens import document_runs

MAPPED_BYTES = 2**26  # of a shard, that packing its weights reads before it maps the file again

T = TypeVar("T")
Function = Callable[..., Any]


class Group(Protocol):
    """Ranks that reduce together."""

    rank: int
    size: int

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        """The sum or the maximum of all ranks' `x`. May write into `x`."""
        ...


class ProcessGroup:
    """Ranks as processes. shared: their memory, if they are on one machine and its processor computes."""

    def __init__(self, group: dist.ProcessGroup, shared: SharedMemory | None = None):
        self.group = group
        self.shared = shared
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        if self.size == 1:
            return x
        x = x.contiguous()
        if self.shared:
            self.shared.all_reduce(x, op)
            return x
        dist.all_reduce(x, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX, group=self.group)
        return x


class ThreadGroup:
    """Ranks as threads of one process, to check shards and layouts with the same layers."""

    def __init__(self, rank: int, slots: list[Tensor | None], barrier: threading.Barrier):
        self.rank = rank
        self.size = len(slots)
        self._slots = slots
        self._barrier = barrier

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        if self.size == 1:
            return x
        self._slots[self.rank] = x
        self._barrier.wait()
        stacked = torch.stack([slot for slot in self._slots if slot is not None])
        result = stacked.sum(0) if op == "sum" else stacked.amax(0)
        self._barrier.wait()  # no rank may overwrite its slot before all have read it
        return result

    def abort(self) -> None:
        """Make the ranks that wait for this one fail."""
        self._barrier.abort()


def run_as_threads(backends: Sequence["TorchBackend"], work: Callable[["TorchBackend"], T]) -> list[T]:
    """Run `work` for every rank of `thread_backends` at once. Returns the results in the order of ranks.

    Raises the first error of a rank after all ranks have ended.
    """
    settle_vector_math()
    results: list[Any] = [None] * len(backends)
    errors: list[BaseException] = []

    def rank_main(rank: int) -> None:
        try:
            results[rank] = work(backends[rank])
        except threading.BrokenBarrierError:
            pass  # another rank failed first
        except BaseException as error:
            errors.append(error)
            for group in (backends[rank].tp_group, backends[rank].kv_group):
                assert isinstance(group, ThreadGroup)
                group.abort()

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(len(backends))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def thread_backends(
    kv_groups: list[list[int]], make: Callable[[Group, Group], "TorchBackend"] | None = None
) -> list["TorchBackend"]:
    """One backend per rank, for `run_as_threads`. kv_groups: ranks that hold the same KV heads.

    make: of a backend, given the group of all ranks and that of the ranks with the same KV heads; TorchBackend if None.
    """
    size = sum(len(group) for group in kv_groups)
    barrier = threading.Barrier(size)
    slots: list[Tensor | None] = [None] * size
    kv: dict[int, ThreadGroup] = {}
    for group in kv_groups:
        kv_barrier = threading.Barrier(len(group))
        kv_slots: list[Tensor | None] = [None] * len(group)
        kv.update({rank: ThreadGroup(index, kv_slots, kv_barrier) for index, rank in enumerate(group)})
    make = make or TorchBackend
    return [make(ThreadGroup(rank, slots, barrier), kv[rank]) for rank in range(size)]


def process_backend(tp_group: dist.ProcessGroup, kv_groups: list[list[int]], dp_size: int) -> "TorchBackend":
    """The backend of this process. Every process must call it: see `own_kv_group`."""
    settle_vector_math()
    on_cpu = dist.get_backend(tp_group) == "gloo"
    groups = (tp_group, own_kv_group(tp_group, kv_groups, dp_size))
    return TorchBackend(*(ProcessGroup(group, connect(group) if on_cpu else None) for group in groups))


def own_kv_group(tp_group: dist.ProcessGroup, kv_groups: list[list[int]], dp_size: int) -> dist.ProcessGroup:
    """The group of ranks with the KV heads of this rank. Every process must call it: it creates those of all replicas.

    World ranks are numbered as in NxD: rank = dp_rank · tp_size + tp_rank.
    """
    tp_size = dist.get_world_size(tp_group)
    mine = None
    for dp_rank in range(dp_size):
        for group in kv_groups:
            ranks = [dp_rank * tp_size + rank for rank in group]
            kv_group = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                mine = kv_group
    assert mine is not None, "every rank is in one KV group"
    return mine


class _CopyToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.all_reduce(grad), None


def _copy_to_region(x: Tensor, group: Group) -> Tensor:
    """x, whose gradient is the sum of all ranks'."""
    return x if group.size == 1 else _CopyToRegion.apply(x, group)


class _ReduceFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return group.all_reduce(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _reduce_from_region(x: Tensor, group: Group) -> Tensor:
    """The sum of all ranks' x, whose gradient each of them gets."""
    return x if group.size == 1 else _ReduceFromRegion.apply(x, group)


class _LinearCrossEntropy(torch.autograd.Function):
    """Σ (log Σ exp − label's logit) of hidden @ weight.T over a vocabulary that is split into tp parts.

    The gradient is computed in the forward pass, chunk by chunk, so that no more than LOSS_CHUNK rows of logits are in
    memory at once, and nothing is computed twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weights: FrozenWeights, labels: Tensor, group: Group) -> Tensor:
        # hidden (N, H), weights (V/tp, H), labels (N,), IGNORED where there is none
        (part,) = weights.sizes
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), LOSS_CHUNK):
            rows = slice(start, start + LOSS_CHUNK)
            logits = weights.multiply(hidden[rows]).float()
            local = labels[rows] - group.rank * part
            here = (local >= 0) & (local < part)  # the label is in this rank's part
            local = local.clamp(0, part - 1)[:, None]
            logits -= group.all_reduce(logits.amax(-1), "max")[:, None]
            label_logit = group.all_reduce(logits.gather(-1, local).squeeze(-1) * here)
            exp = logits.exp_()
            exp_sum = group.all_reduce(exp.sum(-1))
            counted = labels[rows] != IGNORED
            total += (exp_sum.log() - label_logit)[counted].sum()
            if dhidden is not None:
                softmax = exp.mul_((counted / exp_sum)[:, None])  # 0 for the others, which get no gradient
                softmax.scatter_add_(-1, local, -here[:, None].to(softmax.dtype))
                dhidden[rows] = weights.multiply_transposed(softmax.to(hidden.dtype))
        if dhidden is not None:
            ctx.save_for_backward(group.all_reduce(dhidden))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (dhidden,) = ctx.saved_tensors
        return dhidden * grad, None, None, None


class ParallelEmbedding(nn.Module):
    """Rows of the vocabulary split over ranks; weight (V/tp, H)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, group: Group):
        super().__init__()
        self.group = group
        self.part = num_embeddings // group.size
        self.weight = nn.Parameter(torch.empty(self.part, embedding_dim))

    def forward(self, ids: Tensor) -> Tensor:
        if self.group.size == 1:
            return F.embedding(ids, self.weight)
        local = ids - self.group.rank * self.part
        here = (local >= 0) & (local < self.part)
        vectors = F.embedding(local.clamp(0, self.part - 1), self.weight) * here[..., None].to(self.weight.dtype)
        return _reduce_from_region(vectors, self.group)


class _ParallelLinear(nn.Module):
    """packed: the weights, if `pack_frozen_weights` has replaced the parameters."""

    packed: FrozenWeights | None = None

    def frozen(self) -> FrozenWeights:
        return self.packed or FrozenWeights([self.get_parameter("weight")])

    def with_lora(self, x: Tensor, scale: float, a: Tensor, b: Sequence[Tensor | None]) -> Any:
        """The layer's outputs with LoRA's added, where inputs and outputs are shared: see `lora_linear`."""
        return lora_linear(x, self.frozen(), scale, a, b)


class ColumnParallelLinear(_ParallelLinear):
    """Outputs split over ranks; weight (output/tp, input)."""

    input_is_shared = False  # by `TorchBackend.share_input`

    def __init__(self, input_size: int, output_size: int, group: Group):
        super().__init__()
        self.group = group
        self.weight = nn.Parameter(torch.empty(output_size // group.size, input_size))

    def forward(self, x: Tensor | tuple[Tensor, ...]) -> Tensor:
        """x: the input, or a tuple with a shared input for each of as many equal blocks of this rank's outputs."""
        if isinstance(x, tuple):
            blocks = zip(x, self.weight.chunk(len(x)), strict=True)
            return torch.cat([F.linear(part, rows) for part, rows in blocks], dim=-1)
        x = x if self.input_is_shared else _copy_to_region(x, self.group)
        return frozen_linear(x, self.packed) if self.packed else F.linear(x, self.weight)


class RowParallelLinear(_ParallelLinear):
    """Inputs split over ranks, partial outputs added up; weight (output, input/tp)."""

    output_is_shared = False  # by `TorchBackend.share_output`

    def __init__(self, input_size: int, output_size: int, group: Group):
        super().__init__()
        self.group = group
        self.weight = nn.Parameter(torch.empty(output_size, input_size // group.size))

    def forward(self, x: Tensor) -> Tensor:
        y = frozen_linear(x, self.packed) if self.packed else F.linear(x, self.weight)
        return y if self.output_is_shared else _reduce_from_region(y, self.group)


class GQAQKVColumnParallelLinear(_ParallelLinear):
    """q, k and v in one layer, KV heads repeated kv_size_multiplier times over the ranks.

    Each rank that holds a copy of a KV head sees only its own queries' gradient of it. The gradients of weight_k and
    weight_v are added up over those ranks, so that the copies stay equal.
    """

    input_is_shared = False  # by `TorchBackend.share_input`

    def __init__(
        self,
        input_size: int,
        output_sizes: Sequence[int],
        kv_size_multiplier: int,
        bias: bool,
        group: Group,
        kv_group: Group,
    ):
        super().__init__()
        self.group = group
        self.kv_group = kv_group
        self.input_size = input_size
        self.output_sizes = tuple(output_sizes)
        self.kv_size_multiplier = kv_size_multiplier
        q_size, kv_size = output_sizes[0] // group.size, output_sizes[1] * kv_size_multiplier // group.size
        self.weight_q = nn.Parameter(torch.empty(q_size, input_size))
        self.weight_k = nn.Parameter(torch.empty(kv_size, input_size))
        self.weight_v = nn.Parameter(torch.empty(kv_size, input_size))
        self.bias_q = nn.Parameter(torch.empty(q_size)) if bias else None
        self.bias_k = nn.Parameter(torch.empty(kv_size)) if bias else None
        self.bias_v = nn.Parameter(torch.empty(kv_size)) if bias else None
        if kv_group.size > 1:
            for weight in (self.weight_k, self.weight_v):
                weight.register_hook(kv_group.all_reduce)

    def forward(self, x: Tensor | tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x: the input of all three, or a tuple with a shared input for each."""
        if isinstance(x, tuple):
            x_q, x_k, x_v = x
        else:
            x_q = x_k = x_v = x if self.input_is_shared else _copy_to_region(x, self.group)
            if self.packed:
                return _split_qkv(frozen_linear(x_q, self.packed), self.packed.sizes)
        return (
            F.linear(x_q, self.weight_q, self.bias_q),
            F.linear(x_k, self.weight_k, self.bias_k),
            F.linear(x_v, self.weight_v, self.bias_v),
        )

    def frozen(self) -> FrozenWeights:
        if self.packed:
            return self.packed
        biases = [bias for bias in (self.bias_q, self.bias_k, self.bias_v) if bias is not None]
        return FrozenWeights([self.weight_q, self.weight_k, self.weight_v], biases)

    def with_lora(
        self, x: Tensor, scale: float, a: Tensor, b: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights = self.frozen()
        return _split_qkv(lora_linear(x, weights, scale, a, b), weights.sizes)


def _split_qkv(y: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """v is a copy, because attention keeps it for the backward pass, and as a part of y it would keep all of y."""
    q, k, v = y.split(sizes, dim=-1)
    return q, k, v.contiguous()


def pack_frozen_weights(
    model: nn.Module, read_shard: Callable[[], Mapping[str, Tensor]], dtypes: Callable[[str], torch.dtype | None]
) -> None:
    """Replace the parameters of the model's parallel linear layers by packed weights, on a CPU, before LoRA is added.

    dtypes: in which to pack the layer of that name, or None to leave it. read_shard: maps the shard's tensors into
    memory. It is called again and again, because what has been read through a mapping counts as memory of this process
    until the mapping is dropped; the model's own one keeps the embeddings.
    """
    shard, read_bytes = read_shard(), 0
    for name, layer in model.named_modules():
        if isinstance(layer, _ParallelLinear) and (dtype := dtypes(name)):
            values = [(part, shard[f"{name}.{part}"]) for part, _ in layer.named_parameters()]  # in the outputs' order
            weights, biases = ([value for _, value in values if value.dim() == dims] for dims in (2, 1))
            layer.packed = FrozenWeights(weights, biases, dtype)
            for part, value in values:
                delattr(layer, part)
                read_bytes += value.nbytes
            if read_bytes > MAPPED_BYTES:
                del values, weights, biases
                shard, read_bytes = read_shard(), 0


class TorchBackend:
    """`trnlora.model.parallel.Backend` over a tensor-parallel group and the group of ranks with the same KV heads."""

    ops = fused_ops
    adds_lora_in_place = recomputes = True
    static_shapes = False
    id_dtype = torch.int64

    def __init__(self, tp_group: Group, kv_group: Group):
        self.tp_group = tp_group
        self.kv_group = kv_group
        self.tp_rank = tp_group.rank
        self.tp_size = tp_group.size

    def parallel_embedding(self, num_embeddings: int, embedding_dim: int) -> nn.Module:
        return ParallelEmbedding(num_embeddings, embedding_dim, self.tp_group)

    def column_parallel_linear(self, input_size: int, output_size: int) -> nn.Module:
        return ColumnParallelLinear(input_size, output_size, self.tp_group)

    def row_parallel_linear(self, input_size: int, output_size: int) -> nn.Module:
        return RowParallelLinear(input_size, output_size, self.tp_group)

    def gqa_qkv_linear(
        self, input_size: int, output_sizes: Sequence[int], kv_size_multiplier: int, bias: bool = False
    ) -> nn.Module:
        return GQAQKVColumnParallelLinear(
            input_size, output_sizes, kv_size_multiplier, bias, self.tp_group, self.kv_group
        )

    def share_input(self, *layers: nn.Module) -> Callable[[Tensor], Tensor]:
        for layer in layers:
            layer.input_is_shared = True  # type: ignore[assignment]
        return lambda x: _copy_to_region(x, self.tp_group)

    def share_output(self, *layers: nn.Module) -> Callable[[Tensor], Tensor]:
        for layer in layers:
            layer.output_is_shared = True  # type: ignore[assignment]
        return lambda y: _reduce_from_region(y, self.tp_group)

    def prepare_attention(self, document_ids: Tensor, documents: list[list[int]] | None = None) -> Documents:
        """Padding counts as a document."""
        if documents is None:
            documents = [list(range(start, stop)) for start, stop, _ in document_runs(document_ids)]
        return Documents(documents, document_ids.device)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, plan: Any, scale: float) -> Tensor:
        return attention_within_documents(q, k, v, plan, scale)

    def cross_entropy(self, hidden: Tensor, lm_head: nn.Module, targets: Tensor) -> Tensor:
        assert isinstance(lm_head, ColumnParallelLinear)
        return _LinearCrossEntropy.apply(hidden, lm_head.frozen(), targets, self.tp_group)

    def mark_step(self) -> None:
        """Every operation has been computed."""

    def compile(self, function: Function) -> Function:
        return function

    def add_over_ranks(self, gradients: Sequence[Tensor]) -> None:
        if self.tp_size > 1 and gradients:
            summed = self.tp_group.all_reduce(torch.cat([gradient.flatten() for gradient in gradients]))
            for gradient, part in zip(gradients, summed.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def add_over_replicas(self, gradients: Sequence[Tensor], group: dist.ProcessGroup) -> None:
        for gradient in gradients:
            dist.all_reduce(gradient, group=group)

    def adamw(self, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
