"""The hand-written gradients, compared with autograd on the plain formulas and with finite differences."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functionalize

from trnlora.model import fused_ops as fused
from trnlora.model import plain_ops
from trnlora.model.fused_ops import rms_norm, rotary, swiglu


def assert_same(ours, plain, x: Tensor, *rest) -> None:  # type: ignore[no-untyped-def]
    found, expected = ours(x, *rest), plain(x, *rest)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    (dx,), (dx_expected,) = torch.autograd.grad(found, x, grad), torch.autograd.grad(expected, x, grad)
    torch.testing.assert_close(dx, dx_expected, atol=1e-6, rtol=1e-5)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_rms_norm() -> None:
    weight = noise(24)
    x = (3 * noise(2, 5, 24)).requires_grad_()
    assert_same(lambda x: rms_norm(x, weight, 1e-5), lambda x: plain_ops.rms_norm(x, weight, 1e-5), x)


def test_rotary_of_a_transposed_view() -> None:
    angles = noise(1, 1, 7, 8)
    x = noise(1, 7, 3, 16).requires_grad_()
    assert_same(
        lambda x, *tables: rotary(x.transpose(1, 2), *tables),
        lambda x, *tables: plain_ops.rotary(x.transpose(1, 2), *tables),
        x, angles.cos(), angles.sin(),
    )  # fmt: skip


def test_swiglu() -> None:
    assert_same(swiglu, plain_ops.swiglu, noise(3, 5, 20).requires_grad_())


def test_gradients_by_finite_differences() -> None:
    x = noise(2, 3, 8).double().requires_grad_()
    angles = noise(2, 3, 4).double()
    assert torch.autograd.gradcheck(lambda x: rotary(x, angles.cos(), angles.sin()), x)
    assert torch.autograd.gradcheck(swiglu, x)


def forward_and_backward(function: Any, x: Tensor, grad: Tensor, *rest: Any) -> Tensor:
    """An autograd.Function's output and its gradient with respect to x."""
    saved: list[Tensor] = []
    y = function.forward(SimpleNamespace(save_for_backward=lambda *tensors: saved.extend(tensors)), x, *rest)
    dx = function.backward(SimpleNamespace(saved_tensors=saved), grad)
    return torch.cat([y.flatten(), (dx[0] if isinstance(dx, tuple) else dx).flatten()])


def test_writes_into_views_survive_functionalization() -> None:
    """torch_xla does this to a program before compiling it: it replaces in-place writes."""
    wide, narrow, tables = noise(2, 5, 16), noise(2, 5, 8), noise(2, 5, 8)
    for call, arguments in (
        (partial(forward_and_backward, fused._RMSNorm), (wide, wide, wide[0, 0], 1e-5)),
        (partial(forward_and_backward, fused._Rotary), (wide, wide, tables.cos(), tables.sin())),
        (partial(forward_and_backward, fused._SwiGLU), (wide, narrow)),
    ):
        assert torch.equal(functionalize(call)(*arguments), call(*arguments))


def test_rms_norm_of_bfloat16_takes_the_mean_in_float32() -> None:
    x, weight = (100 * noise(4, 512)).bfloat16(), torch.ones(512, dtype=torch.bfloat16)
    expected = F.rms_norm(x.float(), (512,), None, 1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).float(), expected, atol=2e-2, rtol=1e-2)
