"""Attention inside packed documents: kernels with bounds and the masked product agree, and the choice between them."""

import importlib.util
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trnlora.backends import attention
from trnlora.backends.attention import KernelAttention, choose_attention, document_bounds, masked_product

SIZES = 4, 2, 32, 1024, torch.float32, torch.device("cpu")  # heads, KV heads, head size, tokens


def test_bounds_are_those_of_documents_and_padding() -> None:
    start, end = document_bounds(torch.tensor([1, 1, 2, 3, 3, 3, 0, 0]))
    assert start.tolist() == [0, 0, 2, 3, 3, 3, 6, 6]
    assert end.tolist() == [2, 2, 3, 6, 6, 6, 8, 8]


def bounded_scores(q: Tensor, k: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Scores (heads, T, T) of q (heads, T, D) and k (KV heads, T, D): causal, and within the bounds (T,)."""
    scores = q @ k.repeat_interleave(len(q) // len(k), 0).transpose(1, 2)
    position = torch.arange(q.shape[1])
    allowed = (position <= position[:, None]) & (position >= low[:, None]) & (position < high[:, None])
    return scores.masked_fill(~allowed, -torch.inf)


def forward(q: Tensor, k: Tensor, v: Tensor, bound_min: Tensor, bound_max: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As attention_cte, with its layouts: the last two (heads, 128, T / 128)."""
    assert bound_min.shape == bound_max.shape == (q.shape[1], 1)
    scores = bounded_scores(q, k, bound_min[:, 0], bound_max[:, 0])
    maximum = scores.amax(-1)
    total = (scores - maximum[..., None]).exp().sum(-1)
    output = scores.softmax(-1) @ v.repeat_interleave(len(q) // len(v), 0)
    return output, *(x.unflatten(1, (-1, 128)).transpose(1, 2) for x in (-maximum, 1 / total))


def backward(
    q: Tensor, k: Tensor, v: Tensor, output: Tensor, grad: Tensor, log_sum_exp: Tensor,
    bound_min: Tensor, bound_max: Tensor, scale: float,
) -> list[Tensor]:  # fmt: skip
    """As attention_bwd, with its layouts: tensors (1, heads, D, T). The probabilities are those of log_sum_exp."""
    q, k, v, output, grad = (x[0].transpose(1, 2) for x in (q, k, v, output, grad))
    repeat = len(q) // len(k)
    scores = bounded_scores(q * scale, k, bound_min, bound_max)
    weights = (scores - log_sum_exp[0].transpose(1, 2).flatten(1)[..., None]).exp()
    dweights = grad @ v.repeat_interleave(repeat, 0).transpose(1, 2)
    dscores = weights * (dweights - (grad * output).sum(-1, keepdim=True))
    dq = dscores @ k.repeat_interleave(repeat, 0) * scale
    dk = (dscores.transpose(1, 2) @ q * scale).unflatten(0, (-1, repeat)).sum(1)
    dv = (weights.transpose(1, 2) @ grad).unflatten(0, (-1, repeat)).sum(1)
    return [x.transpose(1, 2)[None] for x in (dq, dk, dv)]


def nkilibs_references() -> KernelAttention:
    """nkilib's own references in torch for the two kernels. They need nki only for its names."""
    source = os.environ.get("NKILIB_SOURCE")
    if not source:
        pytest.skip("needs nkilib's source: NKILIB_SOURCE=<clone of nki-library>/src/nkilib_src, see docs/trainium.md")
    folder = Path(source) / "nkilib/core"
    package = types.ModuleType("nkilib_core")
    package.__path__ = [str(folder)]  # the package's own __init__ imports nki
    sys.modules["nkilib_core"] = package
    for name in ("utils", "attention"):
        inner = sys.modules[f"nkilib_core.{name}"] = types.ModuleType(f"nkilib_core.{name}")
        inner.__path__ = [str(folder / name)]
    asserts = sys.modules["nkilib_core.utils.kernel_assert"] = types.ModuleType("kernel_assert")

    def kernel_assert(condition: bool, message: str = "") -> None:
        assert condition, message

    asserts.kernel_assert, asserts.assert_shape = kernel_assert, None  # type: ignore[attr-defined]

    def reference(name: str) -> Callable[..., Any]:
        spec = importlib.util.spec_from_file_location(f"nkilib_core.attention.{name}", folder / f"attention/{name}.py")
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, f"{name}_ref")

    cte, bwd = reference("attention_cte_torch"), reference("attention_bwd_torch")

    def cte_forward(q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor) -> Any:
        return cte(
            q, k, v, scale=1.0, causal_mask=True, tp_q=True, tp_k=True, tp_out=False, cache_softmax=True,
            bound_min=low, bound_max=high,
        )  # fmt: skip

    def bwd_backward(*tensors: Any) -> Any:
        *inputs, low, high, scale = tensors
        gradients = bwd(
            *inputs, bound_min=low, bound_max=high, use_causal_mask=True, mixed_precision=True, softmax_scale=scale
        )
        return [gradients[f"out_d{name}_ref"] for name in "qkv"]

    return KernelAttention(cte_forward, bwd_backward)


@pytest.mark.parametrize(
    "kernels", [lambda: KernelAttention(forward, backward), pytest.param(nkilibs_references, marks=pytest.mark.long)],
    ids=["documented", "nkilib"],
)  # fmt: skip
def test_kernels_with_bounds_equal_the_masked_product(kernels: Callable[[], KernelAttention]) -> None:
    """Outputs and gradients, for rows with several documents, one of them of one token, with and without padding."""
    attend = kernels()
    generator = torch.Generator().manual_seed(0)
    rows = [[(1, 100), (2, 1), (3, 300), (0, 111)], [(1, 512)]]
    documents = torch.tensor([[id for id, size in row for _ in range(size)] for row in rows])
    inputs = [torch.randn(2, heads, 512, 32, generator=generator) for heads in (4, 2, 2)]
    grad = torch.randn(2, 4, 512, 32, generator=generator)
    results = []
    for function in (masked_product, attend):
        q, k, v = copies = [x.clone().requires_grad_() for x in inputs]
        output = function(q, k, v, documents, 0.2)
        output.backward(grad)
        results.append([output.detach(), *(x.grad for x in copies)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def wrong(*arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    output, *statistics = forward(*arguments)
    return output * 1.2, statistics[0], statistics[1]


def test_kernels_are_chosen_where_they_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    right = KernelAttention(forward, backward)
    monkeypatch.setattr(attention, "nkilib_kernels", lambda: right)
    chosen, name = choose_attention(*SIZES)
    assert chosen is right
    assert name.startswith("nkilib's attention_cte and attention_bwd (")


def test_the_masked_product_is_chosen_otherwise_and_the_reason_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, kv_heads, size, _, dtype, device = SIZES
    assert choose_attention(*SIZES) == (
        masked_product,
        "masked product (nkilib's kernels are not installed: No module named 'nkilib')",
    )
    for tokens, head in ((1000, size), (16384, size), (1024, 256)):
        chosen, name = choose_attention(heads, kv_heads, head, tokens, dtype, device)
        assert chosen is masked_product
        assert f"here are {tokens} and {head}" in name

    def fails(*unused: Tensor) -> Any:
        raise RuntimeError("NCC_EVRF013\na page of details")

    for kernel, reason in (
        (wrong, "nkilib's kernels differ from it by "),
        (fails, "nkilib's kernels failed: NCC_EVRF013)"),
    ):
        monkeypatch.setattr(attention, "nkilib_kernels", lambda kernel=kernel: KernelAttention(kernel, backward))
        chosen, name = choose_attention(*SIZES)
        assert chosen is masked_product
        assert reason in name
