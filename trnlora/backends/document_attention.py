"""Causal attention within the documents of packed rows: one call per document.

So there is no mask, and no work across documents, which in a packed row is most of the square.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Documents:
    """The documents of a batch, whose K tokens (all rows, one after the other) they may share.

    documents: the tokens of each, as indices of the K. Every token is in one of them or in several.
    lengths: of the documents, R in all. token (R,): which of the K, document after document. first (K,): where each
    token is first. again (R − K,): where one is that was before, and again_token: which of the K.
    """

    def __init__(self, documents: Sequence[Sequence[int]], device: torch.device):
        self.lengths = [len(document) for document in documents]
        tokens = [token for document in documents for token in document]
        first: dict[int, int] = {}
        again = [place for place, token in enumerate(tokens) if first.setdefault(token, place) != place]
        self.token = torch.tensor(tokens, device=device)
        self.first = torch.tensor([first[token] for token in range(len(first))], device=device)
        self.again = torch.tensor(again, dtype=torch.int64, device=device)
        self.again_token = self.token[self.again]


class _Expand(torch.autograd.Function):
    """(…, K, D) to (…, R, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, documents: Documents) -> Tensor:
        ctx.documents = documents
        return x.index_select(-2, documents.token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        documents: Documents = ctx.documents
        dx = grad.index_select(-2, documents.first)
        # index_add is slow: only for these
        return dx.index_add_(-2, documents.again_token, grad.index_select(-2, documents.again)), None


class _Collect(torch.autograd.Function):
    """(R, …) to (K, …). Where documents share a token, its values are equal."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, documents: Documents) -> Tensor:
        ctx.documents = documents
        return x.index_select(0, documents.first)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        documents: Documents = ctx.documents
        dx = grad.new_zeros((len(documents.token), *grad.shape[1:]))
        return dx.index_copy_(0, documents.first, grad), None


def attention_within_documents(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float) -> Tensor:
    """As `trnlora.model.parallel.Backend.attention`: q (B, heads, T, D), k and v (B, KV heads, T, D); K is B·T."""
    batch, gqa = q.shape[0], q.shape[1] != k.shape[1]
    q, k, v = (x.transpose(0, 1).flatten(1, 2)[None] for x in (q, k, v))  # (1, heads, K, D)
    is_shared = len(documents.again) > 0
    if is_shared:
        q, k, v = (_Expand.apply(x, documents) for x in (q, k, v))
    attended = [
        F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=gqa, scale=scale).transpose(1, 2)[0]  # type: ignore[misc]
        for qkv in zip(*(x.split(documents.lengths, dim=2) for x in (q, k, v)), strict=True)
    ]
    y = torch.cat(attended) if len(attended) > 1 else attended[0]  # (R, heads, D), as the layer's next product needs it
    if is_shared:
        y = _Collect.apply(y, documents)
    return y.unflatten(0, (batch, -1)).transpose(1, 2)
