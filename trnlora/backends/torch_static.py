"""The static form of the torch backend: what a compiler of whole graphs needs, such as that of Trainium.

Fixed shapes, no control flow that depends on data, no loop over documents, ids of 32 bits, no random numbers of the
device, no gather over the vocabulary. `compile_model` compiles one graph for each kind of block, and not one for the
whole model, whose compilation would take as many times longer as it has layers. The parameters, the shards and the
numbers are those of `trnlora.backends.torch`; tests/test_static.py compares the two.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from trnlora.backends.attention import Attention, choose_attention, masked_product
from trnlora.backends.mkl import settle_vector_math
from trnlora.backends.torch import Function, Group, TorchBackend, own_kv_group
from trnlora.model import plain_ops
from trnlora.model.config import LOSS_CHUNK, ModelConfig
from trnlora.model.decoder import IGNORED, DecoderLM
from trnlora.model.lora import add_lora
from trnlora.params import Params
from trnlora.weights.storage import PRETRAINED_TAG, load_rank, rank_file


class FunctionalGroup:
    """Ranks as processes, with collectives that a graph can hold: they return new tensors."""

    def __init__(self, group: dist.ProcessGroup):
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.name = group.group_name

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        if self.size == 1:
            return x
        # What torch.distributed's collectives become in a graph.
        ops = torch.ops._c10d_functional
        return cast(Tensor, ops.wait_tensor(ops.all_reduce(x.contiguous(), op, self.name)))


class StaticTorchBackend(TorchBackend):
    """`trnlora.model.parallel.Backend` with static shapes.

    compiler: torch.compile's backend for the graphs; None: run them as they are. attend: attention inside documents.
    """

    ops = plain_ops
    adds_lora_in_place = recomputes = False
    static_shapes = True
    id_dtype = torch.int32  # Trainium has no int64

    def __init__(
        self, tp_group: Group, kv_group: Group, compiler: str | Function | None, attend: Attention = masked_product
    ):
        super().__init__(tp_group, kv_group)
        self.compiler = compiler
        self.attend = attend
        self._chunk_loss = self.compile(_chunk_loss)
        self._sum_flat = self.compile(_sum_flat)

    def compile(self, function: Function) -> Function:
        if self.compiler is None:
            return function
        compiled: Function = torch.compile(function, backend=self.compiler, fullgraph=True, dynamic=False)
        return compiled

    def prepare_attention(self, document_ids: Tensor, documents: list[list[int]] | None = None) -> Any:
        """As it is: what a layer makes of it is part of the layer's graph."""
        return document_ids

    def attention(self, q: Tensor, k: Tensor, v: Tensor, plan: Any, scale: float) -> Tensor:
        return self.attend(q, k, v, plan, scale)

    def cross_entropy(self, hidden: Tensor, lm_head: nn.Module, targets: Tensor) -> Tensor:
        rows = targets.numel()
        padding = -rows % LOSS_CHUNK  # so that all chunks have one shape
        hidden = F.pad(hidden.flatten(0, 1), (0, 0, 0, padding))
        targets = F.pad(targets.flatten(), (0, padding), value=IGNORED)
        return _ChunkedCrossEntropy.apply(hidden, lm_head.weight, targets, self)

    def add_over_ranks(self, gradients: Sequence[Tensor]) -> None:
        if self.tp_size > 1 and gradients:
            self._sum_flat(list(gradients), self.tp_group)

    def add_over_replicas(self, gradients: Sequence[Tensor], group: dist.ProcessGroup) -> None:
        self._sum_flat(list(gradients), FunctionalGroup(group))

    def adamw(self, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        return StaticAdamW(parameters, lr, weight_decay, self.compile)


def build_static_model(
    mesh: Any,
    params: Params,
    config: ModelConfig,
    shards: Path,
    kv_groups: list[list[int]],
    compiler: str | Function | None,
    device: torch.device,
) -> DecoderLM:
    """As `trnlora.backends.training.TrainingBackend.build_model`, compiled. Prints which attention is chosen."""
    settle_vector_math()
    tp_group = mesh["tensor_parallel"].get_group()
    kv_group = own_kv_group(tp_group, kv_groups, params.train.dp_size)
    tp_size, copies = params.convert.tp_size, params.convert.kv_size_multiplier
    attend, name = choose_attention(
        config.num_attention_heads // tp_size, config.num_key_value_heads * copies // tp_size, config.head_dim,
        params.data.seq_len, getattr(torch, params.model.dtype), device,
    )  # fmt: skip
    if dist.get_rank() == 0:
        print(f"attention: {name}", flush=True)
    backend = StaticTorchBackend(FunctionalGroup(tp_group), FunctionalGroup(kv_group), compiler, attend)
    shard = load_rank(rank_file(shards, PRETRAINED_TAG, backend.tp_rank))
    model = DecoderLM.from_shard(config, backend, copies, shard)
    add_lora(model, params.lora)
    model.recompute_layers = params.train.activation_checkpointing
    compile_model(model)
    return model.to(device)


def compile_model(model: DecoderLM) -> None:
    """Compile the embedding, each layer and the final norm, in place. All layers share one graph."""
    backend = model.backend
    assert isinstance(backend, StaticTorchBackend)
    embedding: nn.Module = model.model.embed_tokens
    embedding.forward = torch.no_grad()(backend.compile(embedding.forward))
    embedding.register_forward_hook(_with_gradient)
    for block in (*model.model.layers, model.model.norm):
        block.forward = backend.compile(block.forward)


def _with_gradient(module: nn.Module, inputs: Any, x: Tensor) -> Tensor:
    """The frozen embedding's output as if it were trained: else the first layer would need a graph of its own."""
    return x.requires_grad_() if torch.is_grad_enabled() else x


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Σ (log Σ exp − label's logit) over the targets that are not ignored, chunk by chunk, with a graph for one chunk.

    The gradient is computed in the forward pass, as in `trnlora.backends.torch`.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, backend: StaticTorchBackend) -> Tensor:
        # hidden (N, H), weight (V/tp, H), targets (N,); N is a multiple of LOSS_CHUNK
        with_gradient = ctx.needs_input_grad[0]
        chunks = zip(hidden.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True)
        losses, gradients = zip(
            *(backend._chunk_loss(rows, weight, ids, backend.tp_group, with_gradient) for rows, ids in chunks),
            strict=True,
        )
        if with_gradient:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (dhidden,) = ctx.saved_tensors
        return dhidden * grad, None, None, None


def _chunk_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, group: Group, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss of some rows, summed, and its gradient with respect to `hidden`.

    A label's logit is found by comparing ids: a gather over a vocabulary that is cut gave zeros on Trainium's XLA.
    """
    part = weight.shape[0]
    logits = F.linear(hidden, weight).float()
    ids = torch.arange(part, dtype=torch.int32, device=targets.device) + group.rank * part
    is_label = targets[:, None] == ids
    counts = (targets != IGNORED).float()
    logits = logits - group.all_reduce(logits.amax(-1), "max")[:, None]
    exp = logits.exp()
    sums = torch.stack((exp.sum(-1), torch.where(is_label, logits, 0.0).sum(-1)))
    exp_sum, label_logit = group.all_reduce(sums).unbind()
    loss = ((exp_sum.log() - label_logit) * counts).sum()
    if not with_gradient:
        return loss, None
    dlogits = (exp / exp_sum[:, None] - is_label.float()) * counts[:, None]
    return loss, group.all_reduce(dlogits.to(weight.dtype) @ weight)


def _sum_flat(tensors: list[Tensor], group: Group) -> None:
    """Replace the tensors by their sums over the group, in one collective."""
    summed = group.all_reduce(torch.cat([tensor.flatten() for tensor in tensors]))
    for tensor, part in zip(tensors, summed.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


class StaticAdamW(torch.optim.AdamW):
    """torch's AdamW with its step as one graph. What changes with the step is computed on the host and passed to it.

    Its state is torch's, so a checkpoint fits either.
    """

    def __init__(
        self, parameters: list[nn.Parameter], lr: float, weight_decay: float, compile: Callable[[Function], Function]
    ):
        super().__init__(parameters, lr=lr, weight_decay=weight_decay)
        self._update = compile(_adamw)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            states = [self._state(parameter) for parameter in parameters]
            step = int(states[0]["step"]) + 1
            for state in states:
                state["step"] = torch.tensor(float(step))  # on the CPU, as torch's
            beta1, beta2 = group["betas"]
            host = [
                1 - group["lr"] * group["weight_decay"],
                group["lr"] / (1 - beta1**step),
                (1 - beta2**step) ** 0.5,
            ]
            self._update(
                parameters,
                [parameter.grad for parameter in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                torch.tensor(host, device=parameters[0].device),
                beta1,
                beta2,
                group["eps"],
            )
        return loss

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


def _adamw(
    parameters: list[Tensor],
    gradients: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    host: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One step of AdamW in place. host: 1 − lr · weight decay, lr / (1 − β₁ᵗ), √(1 − β₂ᵗ)."""
    decay, step_size, correction = host.unbind()
    for parameter, gradient, average, square in zip(parameters, gradients, averages, squares, strict=True):
        average.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).add_(gradient * gradient * (1 - beta2))
        parameter.mul_(decay).sub_(average / (square.sqrt() / correction + eps) * step_size)
