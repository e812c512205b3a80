"""The element-wise operations of a decoder layer, with hand-written gradients: few passes over memory, no copies kept.

Autograd's own gradients of these keep every intermediate and make a zeroed copy of the whole tensor for each slice;
on a CPU that costs as much time as the matrix products. All are exact, and their weights are frozen (LoRA trains none
of them).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()  # the mean is taken in float32 whatever the dtype, as in HF's Llama
        squares = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square()  # one pass over x
        rstd = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (wide * rstd).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight, rstd = ctx.saved_tensors
        x_wide = x.float()
        dx = (grad * weight).float()
        # d/dx of x·rstd: what lies along x changes rstd instead
        along = torch.linalg.vecdot(dx, x_wide).unsqueeze(-1).div_(x.shape[-1]).mul_(rstd.pow(3))
        return dx.mul_(rstd).addcmul_(x_wide, along, value=-1).to(x.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / RMS(x) · weight over the last dim."""
    return _RMSNorm.apply(x, weight, eps)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None  # a rotation's transpose turns back


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    low, high = x[..., :half], x[..., half:]
    y = torch.empty_like(x)
    torch.mul(low, cos, out=y[..., :half]).addcmul_(high, sin, value=-1)
    torch.mul(high, cos, out=y[..., half:]).addcmul_(low, sin)
    return y


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (…, D) by tables (…, D/2): channel i is paired with i + D/2, as in HF's Llama."""
    return _Rotary.apply(x, cos, sin)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        dgate_up = torch.empty_like(gate_up)
        dgate, dup = dgate_up.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=dup)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=dgate)
        return dgate_up


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of [gate, up] (…, 2·I), to (…, I)."""
    return _SwiGLU.apply(gate_up)
