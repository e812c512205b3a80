"""Linear layers whose weights are frozen: packed weights where they are faster, and LoRA's products on top in one pass.

MKL chooses its kernels by the processor's maker. On AMD processors with AVX-512 oneDNN's products are faster; torch has
them for weights whose layout was changed beforehand ("packed"), which inductor uses for frozen models. Source of the
operators: pytorch, aten/src/ATen/native/mkldnn/Linear.cpp. bench/train.py measures both.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trnlora.processor import check_bf16_products, cpu_info

# oneDNN makes a kernel for each number of rows and shape of a weight: 2 ms and about 0.6 MiB, for 1,024 of them. So
# batches have a multiple of this number of tokens, and of labelled ones, where weights are packed.
ROW_MULTIPLE = 16


def library_of_products() -> str:
    """What multiplies by frozen float32 weights on this processor: oneDNN with packed weights, or MKL, torch's choice.

    A rule and not a measurement, so that the same machine always computes the same bits.
    """
    on_amd = cpu_info("vendor_id") == "AuthenticAMD" and torch.backends.mkldnn.is_available()
    return "oneDNN" if on_amd and torch.backends.cpu.get_cpu_capability() == "AVX512" else "MKL"


def packed_dtype(matmul_precision: str) -> torch.dtype | None:
    """The dtype in which to pack float32 weights on this processor; None: not at all.

    matmul_precision: of train in params.yaml. Raises UserError as `check_bf16_products` does.
    """
    if matmul_precision == "bf16":
        check_bf16_products()
        return torch.bfloat16
    return torch.float32 if library_of_products() == "oneDNN" else None


class PackedWeight:
    """A frozen weight (outputs, inputs), packed once for products with it and once for those with its transpose.

    dtype: in which to multiply. The results have that of the other factor.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        pack = torch.ops.mkldnn._reorder_linear_weight
        weight = weight.detach().to(dtype)
        self.shape = weight.shape
        self._weight = pack(weight)
        self._transpose = pack(weight.t().contiguous())

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (rows, inputs) @ weightᵀ + bias."""
        return _product(x, self._weight, bias, self.shape[0])

    def multiply_transposed(self, y: Tensor) -> Tensor:
        """y (rows, outputs) @ weight."""
        return _product(y, self._transpose, None, self.shape[1])


def _product(x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    if not len(x):  # oneDNN needs rows
        return x.new_empty((0, outputs))
    bias = None if bias is None else bias.to(packed.dtype)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(packed.dtype), packed, bias, "none", [], "")
    return y.to(x.dtype)


class FrozenWeights:
    """The frozen weights (outputs, inputs) of a layer's outputs, one below the other, and their biases, if any.

    dtype: in which to pack them as one weight. None: they are used as they are, and nothing is copied.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor] = (), dtype: torch.dtype | None = None):
        self.sizes = [len(weight) for weight in weights]
        self._bias = torch.cat(list(biases)) if biases else None
        self._packed = PackedWeight(torch.cat(list(weights)), dtype) if dtype else None
        self._plain = () if dtype else tuple(weights)

    def sizes_of(self, outputs: int) -> list[int]:
        """Of so many outputs: the weights', or equal parts of the only weight's."""
        return self.sizes if len(self.sizes) == outputs else [sum(self.sizes) // outputs] * outputs

    def multiply(self, x: Tensor) -> Tensor:
        """x (rows, inputs) to (rows, all outputs)."""
        if self._packed:
            return self._packed.multiply(x, self._bias)
        if len(self._plain) == 1:
            return F.linear(x, self._plain[0], self._bias)
        y = x.new_empty((len(x), sum(self.sizes)))
        for part, weight in zip(y.split(self.sizes, dim=1), self._plain, strict=True):
            torch.mm(x, weight.t(), out=part)
        return y if self._bias is None else y.add_(self._bias)

    def multiply_transposed(self, y: Tensor) -> Tensor:
        """y (rows, all outputs) to (rows, inputs)."""
        if self._packed:
            return self._packed.multiply_transposed(y)
        (part, weight), *others = zip(y.split(self.sizes, dim=1), self._plain, strict=True)
        x = part @ weight
        for part, weight in others:
            x.addmm_(part, weight)
        return x

    def product(self, x: Tensor, matrix: Tensor, rows: int) -> Tensor:
        """x @ matrix, one size of which is `rows`; by the frozen weights' library, if it has a kernel for so many."""
        if not self._packed or not rows or rows % ROW_MULTIPLE:
            return x @ matrix
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, matrix.t(), None, "none", [], "")
        return y


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: FrozenWeights) -> Tensor:
        ctx.weights = weights
        return weights.multiply(x.flatten(0, -2)).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.weights.multiply_transposed(grad.flatten(0, -2)).unflatten(0, grad.shape[:-1]), None


def frozen_linear(x: Tensor, weights: FrozenWeights) -> Tensor:
    """x (…, inputs) to (…, all outputs)."""
    return _FrozenLinear.apply(x, weights)


class _LoraLinear(torch.autograd.Function):
    """The B's of all outputs are one matrix, so that LoRA adds few products, and none of the frozen ones' size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: FrozenWeights, scale: float, a: Tensor, *b: Tensor | None) -> Tensor:
        rows = x.flatten(0, -2)
        blocks = _blocks(b, weights.sizes_of(len(b)), len(a))
        whole_b = _one_below_the_other(b, blocks, sum(weights.sizes), len(a))
        low = weights.product(rows, a.t(), len(rows)).mul_(scale)
        y = weights.multiply(rows).addmm_(low, whole_b.t())
        ctx.weights, ctx.scale, ctx.blocks = weights, scale, blocks
        ctx.save_for_backward(rows, low, a, whole_b)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, whole_b = ctx.saved_tensors
        weights, dy = ctx.weights, grad.flatten(0, -2)
        dlow = weights.product(dy, whole_b, len(dy)).mul_(ctx.scale)
        dwhole_b = weights.product(low.t(), dy, len(dy)).t()  # twice as fast as dyᵀ @ low
        db = [None if block is None else dwhole_b[block] for block in ctx.blocks]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = weights.multiply_transposed(dy).addmm_(dlow, a).unflatten(0, grad.shape[:-1])
        return dx, None, None, weights.product(dlow.t(), x, len(dy)), *db


def _blocks(b: Sequence[Tensor | None], sizes: Sequence[int], columns: int) -> list[tuple[slice, slice] | None]:
    """Where each trained output's B is in that of all outputs: its rows, and its columns if they have no common A."""
    rank = next(matrix.shape[1] for matrix in b if matrix is not None)
    blocks: list[tuple[slice, slice] | None] = []
    row = column = 0
    for matrix, size in zip(b, sizes, strict=True):
        blocks.append(None if matrix is None else (slice(row, row + size), slice(column, column + rank)))
        row += size
        if matrix is not None and columns > rank:
            column += rank
    return blocks


def _one_below_the_other(
    b: Sequence[Tensor | None], blocks: Sequence[tuple[slice, slice] | None], rows: int, columns: int
) -> Tensor:
    """(rows, columns), 0 outside the blocks."""
    first = next(matrix for matrix in b if matrix is not None)
    if first.shape == (rows, columns):
        return first
    whole = first.new_zeros(rows, columns)
    for matrix, block in zip(b, blocks, strict=True):
        if matrix is not None and block is not None:
            whole[block] = matrix
    return whole


def lora_linear(x: Tensor, weights: FrozenWeights, scale: float, a: Tensor, b: Sequence[Tensor | None]) -> Tensor:
    """x (…, inputs) to (…, all outputs): the frozen weights' plus scale · B(A(x)).

    a (r, inputs) or, if the trained outputs do not share it, (r · their number, inputs). b: for each output of
    `FrozenWeights.sizes_of` (its size, r), or None if it is not trained.
    """
    return _LoraLinear.apply(x, weights, scale, a, *b)
