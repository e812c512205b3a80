"""Causal attention inside packed documents with fixed shapes, in implementations that can replace each other.

Each takes q (B, heads, T, D), k and v (B, KV heads, T, D), document_ids (B, T) and the factor on the scores, and
returns (B, heads, T, D). A token attends to itself and the earlier tokens of its document. Padding, of id 0, is one.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def masked_product(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor, scale: float) -> Tensor:
    """Plain matrix products with a mask: all T · T scores, in float32."""
    batch, heads, tokens, size = q.shape
    # Contiguous: torch-neuronx did not compile products of transposed views.
    q, k, v = (x.contiguous() for x in (q, k, v))
    q = q.unflatten(1, (k.shape[1], heads // k.shape[1]))  # (B, KV heads, queries per KV head, T, D)
    scores = torch.matmul(q, k[:, :, None].transpose(-1, -2)).float() * scale
    position = torch.arange(tokens, dtype=torch.int32, device=q.device)
    same = document_ids[:, None, None, :, None] == document_ids[:, None, None, None, :]
    mask = same & (position[:, None] >= position)
    # A finite value: −inf gave NaN in bfloat16 on Trainium. Each row has its own token, so no row has this value alone.
    scores = torch.where(mask, scores, -30000.0)
    weights = torch.softmax(scores, dim=-1).to(v.dtype)
    return torch.matmul(weights, v[:, :, None]).view(batch, heads, tokens, size)


def best_attention() -> Attention:
    return masked_product
