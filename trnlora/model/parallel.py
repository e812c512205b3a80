"""What the model needs from whatever runs it in parallel.

`trnlora.model.decoder` and `trnlora.model.lora` ask a backend for four layers, attention and a loss, under NxD's names
and with NxD's parameter names, so that every backend loads the same shard files. `trnlora.backends.torch` builds them
on torch.distributed, `trnlora.backends.nxd` uses NxD's.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Ops(Protocol):
    """The element-wise operations of a decoder layer: `trnlora.model.fused_ops` or `trnlora.model.plain_ops`."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / RMS(x) · weight over the last dim."""
        ...

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate x (…, D) by tables (…, D/2): channel i is paired with i + D/2, as in HF's Llama."""
        ...

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """silu(gate) · up of [gate, up] (…, 2·I), to (…, I)."""
        ...


class Backend(Protocol):
    """Parallel layers over tp_size ranks; shapes in the docstrings are what one rank sees."""

    tp_rank: int
    tp_size: int
    adds_lora_in_place: bool  # whether its layers have `with_lora`, which adds LoRA's products to theirs in place
    recomputes: bool  # whether to recompute cheap results in the backward pass; elsewhere a compiler decides
    static_shapes: bool  # whether every new shape would need another compilation
    id_dtype: torch.dtype  # of the ids of tokens and documents, of positions and labels

    @property
    def ops(self) -> Ops:
        """The element-wise operations."""
        ...

    def parallel_embedding(self, num_embeddings: int, embedding_dim: int) -> nn.Module:
        """Token ids (B, T) to vectors (B, T, H), whole on every rank; weight (V/tp, H)."""
        ...

    def column_parallel_linear(self, input_size: int, output_size: int) -> nn.Module:
        """(…, input) whole to (…, output/tp); weight (output/tp, input)."""
        ...

    def row_parallel_linear(self, input_size: int, output_size: int) -> nn.Module:
        """(…, input/tp) to (…, output) whole; weight (output, input/tp)."""
        ...

    def gqa_qkv_linear(
        self, input_size: int, output_sizes: Sequence[int], kv_size_multiplier: int, bias: bool = False
    ) -> nn.Module:
        """(…, input) whole to q (…, output_sizes[0]/tp), k and v (…, output_sizes[1]·multiplier/tp) of this rank."""
        ...

    def share_input(self, *layers: nn.Module) -> Callable[[Tensor], Tensor]:
        """Let column-parallel layers take an input that the returned function has prepared, once for all of them."""
        ...

    def share_output(self, *layers: nn.Module) -> Callable[[Tensor], Tensor]:
        """Let row-parallel layers give outputs that the returned function completes, once for a sum of them."""
        ...

    def prepare_attention(self, document_ids: Tensor, documents: list[list[int]] | None = None) -> Any:
        """What `attention` needs to know about document_ids (B, T), computed once for all layers.

        documents: the tokens of each, as indices of T, if B is 1 and they may share tokens. Never with static_shapes.
        """
        ...

    def attention(self, q: Tensor, k: Tensor, v: Tensor, plan: Any, scale: float) -> Tensor:
        """Causal attention inside each document: q (B, heads, T, D), k and v (B, KV heads, T, D) to (B, heads, T, D).

        plan: of `prepare_attention`. scale: the factor on the scores.
        """
        ...

    def cross_entropy(self, hidden: Tensor, lm_head: nn.Module, targets: Tensor) -> Tensor:
        """Sum of the cross-entropies in nats of the model's output against targets: token ids, or −100 for none.

        hidden (N, H) and targets (N,) are of the labelled tokens, and perhaps of a few others. With static_shapes they
        are of all tokens: targets (B, T), and hidden (B, T, H), or with sequence parallelism this rank's part of the
        tokens. lm_head: the frozen column_parallel_linear from H to the vocabulary, which gathers that part.
        """
        ...

    def mark_step(self) -> None:
        """Where operations are only recorded: compute all that was recorded so far, as one graph. Elsewhere nothing.

        A value that Python reads (`item`) before that is computed by itself, with all that leads to it, and then again.
        """
        ...

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Where graphs are compiled: the function, of tensors and lists of them, as one graph. Elsewhere, itself."""
        ...

    def add_over_ranks(self, gradients: Sequence[Tensor]) -> None:
        """Make each gradient of a weight that is whole on every rank, in place, the sum over the tensor-parallel ranks.

        Does nothing where the layers or the optimizer add them up already.
        """
        ...

    def add_over_replicas(self, gradients: Sequence[Tensor], group: Any) -> None:
        """Make each gradient, in place, the sum over the data-parallel replicas in `group`."""
        ...

    def adamw(self, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> Optimizer:
        """AdamW over `parameters`, in float32."""
        ...
