"""NxD's parallel layers and optimizer on torch_xla, for Trainium.

Written against neuronx_distributed 0.18 (Neuron SDK 2.29); 0.19 of SDK 2.30 and 2.31 has the same training code. The
model, data, schedule, clipping and adapter format are those of every backend. tests/neuron runs this file against
NxD's own Python code and torch_xla on a CPU; no part of it has been run on a device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch_xla.core.xla_model as xm
from neuronx_distributed.modules.qkv_linear import GQAQKVColumnParallelLinear
from neuronx_distributed.parallel_layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear
from neuronx_distributed.parallel_layers import parallel_state as state
from neuronx_distributed.parallel_layers.loss_functions import parallel_cross_entropy
from torch import Tensor, nn
from torch_xla.utils.checkpoint import checkpoint

from trnlora.model import fused_ops
from trnlora.params import Neuron

SEQUENCE = 1  # the dimension of (B, T, H) that sequence parallelism cuts


class _Embedding(ParallelEmbedding):
    def forward(self, ids: Tensor) -> Tensor:
        x = super().forward(ids)
        return x.transpose(0, 1) if self.sequence_parallel_enabled else x  # NxD returns (T/tp, B, H) there


class _OwnGradient(torch.autograd.Function):
    """Passes a copy of the gradient on.

    NxD's layer adds up the gradients of k and v over the ranks in place. The sum of a base layer and its LoRA gives
    both the same gradient tensor, which would then be added up twice.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clone()


class _QKVLinear(GQAQKVColumnParallelLinear):
    def __init__(
        self,
        input_size: int,
        output_sizes: Sequence[int],
        kv_size_multiplier: int,
        bias: bool,
        sequence_parallel: bool,
    ):
        super().__init__(
            input_size, list(output_sizes), bias=bias, gather_output=False, kv_size_multiplier=kv_size_multiplier,
            fuse_qkv=False, sequence_parallel_enabled=sequence_parallel,
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.sequence_parallel_enabled:  # NxD gathers along dim 0 here, whatever its other layers do
            q, k, v = (y.transpose(0, 1) for y in super().forward(x.transpose(0, 1)))
        else:
            q, k, v = super().forward(x)
        return q, _OwnGradient.apply(k), _OwnGradient.apply(v)


class NxdBackend:
    """`trnlora.model.parallel.Backend` over NxD's groups, which `trnlora.backends.nxd_training.NxdStrategy` creates."""

    ops = fused_ops
    adds_lora_in_place = recomputes = False
    static_shapes = True
    id_dtype = torch.int64

    def __init__(self, neuron: Neuron, dtype: torch.dtype):
        """dtype: of the model's weights."""
        self.dtype = dtype
        self.sequence_parallel = neuron.sequence_parallel
        self.selective_checkpointing = neuron.selective_checkpointing
        self.tp_rank = state.get_tensor_model_parallel_rank()
        self.tp_size = state.get_tensor_model_parallel_size()

    def parallel_embedding(self, num_embeddings: int, embedding_dim: int) -> nn.Module:
        return _Embedding(
            num_embeddings, embedding_dim, sequence_parallel_enabled=self.sequence_parallel,
            dtype=self.dtype,  # NxD casts the vectors to it. XLA would carry its default, float32, through the model.
        )  # fmt: skip

    def column_parallel_linear(self, input_size: int, output_size: int) -> nn.Module:
        return ColumnParallelLinear(
            input_size, output_size, bias=False, gather_output=False,
            sequence_parallel_enabled=self.sequence_parallel, sequence_dimension=SEQUENCE,
        )  # fmt: skip

    def row_parallel_linear(self, input_size: int, output_size: int) -> nn.Module:
        return RowParallelLinear(
            input_size, output_size, bias=False, input_is_parallel=True,
            sequence_parallel_enabled=self.sequence_parallel, sequence_dimension=SEQUENCE,
        )  # fmt: skip

    def gqa_qkv_linear(
        self, input_size: int, output_sizes: Sequence[int], kv_size_multiplier: int, bias: bool = False
    ) -> nn.Module:
        return _QKVLinear(input_size, output_sizes, kv_size_multiplier, bias, self.sequence_parallel)

    def share_input(self, *layers: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: x  # NxD's layers prepare it themselves

    def share_output(self, *layers: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda y: y  # NxD's layers complete theirs themselves

    def prepare_attention(self, document_ids: Tensor, documents: list[list[int]] | None = None) -> Tensor:
        """The mask (B, 1, T, T): tokens attend to earlier tokens of the same document, padding to padding."""
        tokens = document_ids.shape[1]
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=document_ids.device).tril()
        return (document_ids[:, None, :, None] == document_ids[:, None, None, :]) & causal

    def attention(self, q: Tensor, k: Tensor, v: Tensor, plan: Tensor, scale: float) -> Tensor:
        # NxD's flash attention kernel has causal masks only, so it cannot separate packed documents.
        if self.selective_checkpointing and torch.is_grad_enabled():
            return checkpoint(_core_attention, q, k, v, plan, scale, use_reentrant=True)  # all that torch_xla supports
        return _core_attention(q, k, v, plan, scale)

    def cross_entropy(self, hidden: Tensor, lm_head: nn.Module, targets: Tensor) -> Tensor:
        # At every position, with zeros where it is ignored: another shape would need another compilation.
        logits = lm_head(hidden).flatten(0, 1).float()  # (B·T, V/tp)
        targets = targets.flatten()
        return (parallel_cross_entropy(logits, targets.clamp(min=0)) * (targets != -100)).sum()

    def mark_step(self) -> None:
        xm.mark_step()

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function  # its operations are recorded with all others

    def add_over_ranks(self, gradients: Sequence[Tensor]) -> None:
        """NxD's layers have added them up, but with sequence parallelism each rank has its own tokens' part."""
        if self.sequence_parallel and gradients:
            _sum(gradients, state.get_tensor_model_parallel_replica_groups())

    def add_over_replicas(self, gradients: Sequence[Tensor], group: dist.ProcessGroup) -> None:
        """Not NxDOptimizer's sum: on 64 ranks with tp 32 of trn2, it combines ranks that hold different shards.

        It sums over the groups of expert parallelism, whose ranks are 32 apart there. Source: neuronx-distributed 0.18,
        parallel_layers (bucket_allreduce_gradients and, for the groups, ascending_descending_ring_PG_group).
        """
        _sum(gradients, state.get_data_parallel_replica_groups())

    def adamw(self, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)


def _sum(tensors: Sequence[Tensor], groups: list[list[int]]) -> None:
    """Replace the tensors by their sums over the group that this rank is in, in one collective."""
    xm.all_reduce(xm.REDUCE_SUM, list(tensors), groups=groups, pin_layout=False)


def _core_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Plain matrix products as in NxD's Llama (its CoreAttention), with a mask for packed documents."""
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scores = torch.matmul(q, k.transpose(2, 3)) * scale  # (B, heads, T, T)
    scores = scores.float().masked_fill(~mask, -10000.0)
    return torch.matmul(torch.softmax(scores, dim=-1).to(q.dtype), v)
