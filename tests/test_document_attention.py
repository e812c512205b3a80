"""Attention within the documents of a batch: of short ones at once, of others one by one."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from trnlora.backends import document_attention
from trnlora.backends.document_attention import SHORT, Documents, attention_within_documents

# Documents of 5, 1, 7 and 5 tokens: two begin with the same three, one is the padding of `NeededTokens`
SHARING = [[0, 1, 2, 3, 4], [5], [0, 1, 2, 6, 7, 8, 9], [10, 11, 12, 13, 14]]


def documents_of(*lengths: int) -> Documents:
    starts = [sum(lengths[:place]) for place in range(len(lengths))]
    tokens = [list(range(start, start + size)) for start, size in zip(starts, lengths, strict=True)]
    return Documents(tokens, torch.device("cpu"))


def attend(qkv: Sequence[Tensor], tokens: list[list[int]]) -> Tensor:
    q, k, v = qkv
    return attention_within_documents(q, k, v, Documents(tokens, torch.device("cpu")), 0.3)


def random_qkv(rows: int, heads: int, kv_heads: int, tokens: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = (heads, kv_heads, kv_heads)
    qkv = [torch.randn(rows, tokens, size, 4, generator=generator, dtype=torch.float64) for size in sizes]
    return [x.to(dtype).transpose(1, 2).requires_grad_() for x in qkv]


@pytest.mark.parametrize(
    ("lengths", "padded"),
    [((SHORT, 40, 50), True), ((SHORT + 1, 40, 50), False), ((SHORT,), False), ((60, 1, 1), False), ((3, 1, 2), True)],
)
def test_short_documents_of_similar_lengths_are_padded(lengths: tuple[int, ...], padded: bool) -> None:
    found = documents_of(*lengths)
    assert found.padded == padded
    assert found.lengths == ([max(lengths)] * len(lengths) if padded else list(lengths))


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_once_and_one_by_one(
    monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int, rows: int, dtype: torch.dtype
) -> None:
    qkv = random_qkv(rows, heads, kv_heads, 5, dtype)
    tokens = SHARING if rows == 3 else [[0, 1, 2], [0, 3, 4]]
    grad = torch.randn(rows, heads, 5, 4, generator=torch.Generator().manual_seed(2)).to(dtype)
    at_once = attend(qkv, tokens)
    gradients = torch.autograd.grad(at_once, qkv, grad)
    monkeypatch.setattr(document_attention, "SHORT", 0)
    one_by_one = attend(qkv, tokens)
    expected = torch.autograd.grad(one_by_one, qkv, grad)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(at_once, one_by_one, atol=tolerance, rtol=tolerance)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, atol=10 * tolerance, rtol=tolerance)


def test_gradients_by_finite_differences() -> None:
    qkv = random_qkv(3, 4, 2, 5, torch.float64)
    assert torch.autograd.gradcheck(lambda *qkv: attend(qkv, SHARING), qkv)


def test_it_is_the_softmax_over_the_tokens_before() -> None:
    q, k, v = (x.detach() for x in random_qkv(3, 4, 2, 5, torch.float32))
    y = attend((q, k, v), SHARING).transpose(1, 2).flatten(0, 1)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    for document in SHARING:
        for place, token in enumerate(document):
            before = document[: place + 1]
            for head in range(4):
                probabilities = (0.3 * k[before, head // 2] @ q[token, head]).softmax(0)
                torch.testing.assert_close(y[token, head], probabilities @ v[before, head // 2], atol=1e-6, rtol=1e-5)
