"""The seam between the one model and what runs it in parallel.

`trnlora.llama` and `trnlora.lora` ask a backend for four layers and a loss, under NxD's names and with NxD's
parameter names, so that every backend loads the same shard files. `backends/torch.py` builds them on
torch.distributed, `backends/neuron.py` takes NxD's.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Backend(Protocol):
    """Parallel layers over tp_size ranks; shapes in the docstrings are what one rank sees."""

    tp_rank: int
    tp_size: int
    static_shapes: bool  # whether every batch must run through the same shapes

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

    def parallel_cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of each position in nats (N,) from this rank's logits (N, V/tp) and whole-vocabulary labels (N,)."""
        ...

    def add_over_replicas(self, gradients: Sequence[Tensor], group: Any) -> None:
        """Make each gradient, in place, the sum over the data-parallel replicas in `group`."""
        ...

    def adamw(self, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """AdamW over `parameters`, in float32."""
        ...
