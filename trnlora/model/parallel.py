"""The seam between the one model and what runs it in parallel.

`trnlora.model.decoder` and `trnlora.model.lora` ask a backend for four layers, attention and a loss, under NxD's names and with NxD's
parameter names, so that every backend loads the same shard files. `backends/torch.py` builds them on
torch.distributed, `backends/neuron.py` takes NxD's.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer


class Backend(Protocol):
    """Parallel layers over tp_size ranks; shapes in the docstrings are what one rank sees."""

    tp_rank: int
    tp_size: int
    static_shapes: bool  # whether each new shape would cost a compilation

    def parallel_embedding(self, num_embeddings: int, embedding_dim: int) -> nn.Module:
        """Token ids (B, T) to vectors (B, T, H), whole on every rank; weight (V/tp, H)."""
        ...

    def column_parallel_linear(self, input_size: int, output_size: int) -> nn.Module:
        """(…, input) whole to (…, output/tp); weight (output/tp, input)."""
        ...

    def row_parallel_linear(self, input_size: int, output_size: int) -> nn.Module:
        """(…, input/tp) to (…, output) whole; weight (output, input/tp)."""
        ...

    def gqa_qkv_linear(self, input_size: int, output_sizes: Sequence[int], kv_size_multiplier: int) -> nn.Module:
        """(…, input) whole to q (…, output_sizes[0]/tp), k and v (…, output_sizes[1]·multiplier/tp) of this rank."""
        ...

    def documents(self, document_ids: Tensor) -> Any:
        """What `attention` needs to know of document_ids (B, T), made once for all layers."""
        ...

    def attention(self, q: Tensor, k: Tensor, v: Tensor, documents: Any) -> Tensor:
        """Causal, inside each document: q (B, heads, T, D), k and v (B, KV heads, T, D) to (B, heads, T, D)."""
        ...

    def cross_entropy(self, hidden: Tensor, lm_head: nn.Module, targets: Tensor) -> Tensor:
        """Sum of the losses in nats against targets, token ids, of the model's output.

        hidden (N, H) and targets (N,) are of labelled tokens alone. With static_shapes they are of all: targets (B, T),
        where −100 marks what counts not, and hidden (B, T, H), or this rank's part of the tokens with sequence
        parallelism, which lm_head, a column_parallel_linear of H to the vocabulary, frozen, puts together.
        """
        ...

    def seed(self, seed: int) -> None:
        """Seed what this rank draws from here on (dropout)."""
        ...

    def add_over_replicas(self, gradients: Sequence[Tensor], group: Any) -> None:
        """Make each gradient, in place, the sum over the data-parallel replicas in `group`."""
        ...

    def adamw(self, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> Optimizer:
        """AdamW over `parameters`, in float32."""
        ...
