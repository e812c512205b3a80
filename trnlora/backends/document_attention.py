"""Causal attention within the documents of packed rows: one call per document, or one for all if they are short.

So there is no work across documents, which in a packed row is most of the square.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Documents of up to so many tokens are padded to the longest one and attended to at once. Their probabilities, which
# are kept for the backward pass, are no larger than the output then, if a head has 64 channels.
SHORT = 64


class Documents:
    """The documents of a batch, whose K tokens (all rows, one after the other) they may share.

    documents: the tokens of each, as indices of the K. Every token is in one of them or in several.
    padded: whether they are short ones, padded to the longest. lengths: of the documents, R in all. token (R,): which
    of the K, document after document. first (K,): where each token is first. again: where one is that was before, and
    again_token: which of the K.
    """

    def __init__(self, documents: Sequence[Sequence[int]], device: torch.device):
        self.lengths = [len(document) for document in documents]
        longest, tokens = max(self.lengths), [token for document in documents for token in document]
        self.padded = len(documents) > 1 and longest <= SHORT and longest * len(documents) <= 2 * len(tokens)
        if self.padded:
            self.lengths = [longest] * len(documents)
        starts = accumulate([0, *self.lengths[:-1]])
        pairs = zip(starts, documents, strict=True)
        places = [start + place for start, document in pairs for place in range(len(document))]
        first: dict[int, int] = {}
        again = [place for place, token in zip(places, tokens, strict=True) if first.setdefault(token, place) != place]
        self.token = torch.zeros(sum(self.lengths), dtype=torch.int64, device=device)
        self.token[places] = torch.tensor(tokens, device=device)
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


class _ShortAttention(torch.autograd.Function):
    """softmax(scale · q kᵀ + mask) v: q (N, rows, D), k and v (N, keys, D), mask (rows, keys)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        probabilities = torch.softmax(torch.baddbmm(mask, q, k.mT, alpha=scale), dim=-1)
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, probabilities)
        return probabilities @ v

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, probabilities = ctx.saved_tensors
        dscores = torch._softmax_backward_data(grad @ (v * ctx.scale).mT, probabilities, -1, grad.dtype)
        return dscores @ k, dscores.mT @ q, probabilities.mT @ grad, None, None


def _attention_of_padded(qkv: Sequence[Tensor], documents: Documents, scale: float) -> Tensor:
    """q (K, heads, D), k and v (K, KV heads, D) to (R, KV heads, D · heads / KV heads). Padding follows the tokens."""
    q, k, v = qkv
    kv_heads, size = k.shape[1:]
    longest = documents.lengths[0]
    per_kv_head = q.shape[1] // kv_heads
    # For each KV head and document: the queries of all heads with that KV head, token after token
    q, k, v = (
        _Expand.apply(x.reshape(len(x), kv_heads, -1).transpose(0, 1), documents).view(-1, longest * heads, size)
        for x, heads in ((q, per_kv_head), (k, 1), (v, 1))
    )
    later = torch.full((longest, longest), -torch.inf, dtype=q.dtype, device=q.device).triu_(1)
    y = _ShortAttention.apply(q, k, v, later.repeat_interleave(per_kv_head, dim=0), scale)
    return y.view(kv_heads, -1, per_kv_head * size).transpose(0, 1)


def attention_within_documents(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float) -> Tensor:
    """As `trnlora.model.parallel.Backend.attention`: q (B, heads, T, D), k and v (B, KV heads, T, D); K is B·T."""
    batch, gqa = q.shape[0], q.shape[1] != k.shape[1]
    if documents.padded and q.dtype.itemsize >= 4:  # others are summed in float32 by the functions below
        by_token = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
        y = _Collect.apply(_attention_of_padded(by_token, documents, scale), documents)
        return y.view(batch, -1, *q.shape[1::2]).transpose(1, 2)
    q, k, v = (x.transpose(0, 1).flatten(1, 2)[None] for x in (q, k, v))  # (1, heads, K, D)
    repeats = documents.padded or len(documents.again) > 0
    if repeats:
        q, k, v = (_Expand.apply(x, documents) for x in (q, k, v))
    attended = [
        F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=gqa, scale=scale).transpose(1, 2)[0]  # type: ignore[misc]
        for qkv in zip(*(x.split(documents.lengths, dim=2) for x in (q, k, v)), strict=True)
    ]
    y = torch.cat(attended) if len(attended) > 1 else attended[0]  # (R, heads, D), as the layer's next product needs it
    if repeats:
        y = _Collect.apply(y, documents)
    return y.unflatten(0, (batch, -1)).transpose(1, 2)
