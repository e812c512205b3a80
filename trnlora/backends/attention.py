"""Causal attention inside packed documents with fixed shapes, in implementations that can replace each other.

Each takes q (B, heads, T, D), k and v (B, KV heads, T, D), document_ids (B, T) and the factor on the scores, and
returns (B, heads, T, D). A token attends to itself and the earlier tokens of its document. In a row, documents are
numbered upwards from 1, and padding, of id 0, comes last and counts as a document.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]

# What nkilib's kernels take: lengths that are a multiple of 512 (attention_cte's tile of keys), at most 8,192 (reported
# for attention_bwd), heads of at most 128. Source: nki-library, core/attention/attention_cte.py.
TILE = 512
QUERY_TILE = 128
LONGEST = 8192
LARGEST_HEAD = 128
CHECK_TOLERANCE = 5e-2  # relative; the kernels multiply in bfloat16


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


def document_bounds(document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Where the document of each token of a row (T,) begins, and where it ends (exclusive), as float32 (T,)."""
    order = torch.where(document_ids > 0, document_ids, torch.iinfo(torch.int32).max)  # padding comes last
    start = (order < order[:, None]).float().sum(1)
    return start, start + (order == order[:, None]).float().sum(1)


class KernelAttention:
    """nkilib's flash attention with bounds for each query, which reads no scores of other documents.

    forward: (q, k, v, bound_min, bound_max) to (output, negative maximum, reciprocal sum) of attention_cte, q being
    scaled; backward: (q, k, v, output, its gradient, log-sum-exp, bound_min, bound_max, scale) to the gradients of
    attention_bwd. See `nkilib_kernels`.
    """

    def __init__(self, forward: Callable[..., Any], backward: Callable[..., Any]):
        self.forward = forward
        self.backward = backward

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor, scale: float) -> Tensor:
        # The kernels' bounds are the same for a whole batch, so a row at a time; its heads are the kernels' batch.
        q, k, v = (x.contiguous() for x in (q, k, v))
        rows = zip(q, k, v, document_ids, strict=True)
        return torch.stack([_BoundedAttention.apply(*row, scale, self) for row in rows])


class _BoundedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor, scale: float, kernel: KernelAttention
    ) -> Tensor:
        # q (heads, T, D), k and v (KV heads, T, D)
        start, end = document_bounds(document_ids)
        output, negative_maximum, reciprocal_sum = kernel.forward(q * scale, k, v, start[:, None], end[:, None])
        output = output.to(q.dtype)
        # Both (heads, 128, T / 128), as attention_bwd takes their log-sum-exp.
        ctx.save_for_backward(q, k, v, output, -(negative_maximum + reciprocal_sum.log()), start, end)
        ctx.scale, ctx.kernel = scale, kernel
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, log_sum_exp, start, end = ctx.saved_tensors
        heads_last = [
            x.transpose(1, 2).contiguous()[None] for x in (*tensors, grad.to(tensors[0].dtype))
        ]  # (1, …, D, T)
        gradients = ctx.kernel.backward(*heads_last, log_sum_exp[None], start, end, ctx.scale)
        dq, dk, dv = (x[0].transpose(1, 2) for x in gradients)
        return dq, dk, dv, None, None, None


def nkilib_kernels() -> KernelAttention:
    """nkilib's kernels as operations that torch.compile keeps whole. Raises ImportError where they are not installed.

    Sources: nki-library, core/attention/attention_cte.py and attention_bwd.py, for the layouts; torch_neuronx, for
    nki_op and wrap_nki.
    """
    from nkilib.core.attention.attention_bwd import attention_bwd
    from nkilib.core.attention.attention_cte import attention_cte
    from torch_neuronx import nki_op, wrap_nki  # type: ignore[attr-defined]  # not in the tests' stand-in
    from torch_neuronx.utils import get_logical_neuron_cores

    cores = int(get_logical_neuron_cores())  # physical cores of one logical core, which share a kernel's work

    @nki_op("trnlora::attention_forward", mutates_args={})
    def forward(q: Tensor, k: Tensor, v: Tensor, bound_min: Tensor, bound_max: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return wrap_nki(attention_cte)[cores](
            q, k, v, scale=1.0, causal_mask=True, tp_q=True, tp_k=True, tp_out=False, cache_softmax=True,
            bound_min=bound_min, bound_max=bound_max,
        )  # fmt: skip

    @nki_op("trnlora::attention_backward", mutates_args={})
    def backward(
        q: Tensor, k: Tensor, v: Tensor, output: Tensor, grad: Tensor, log_sum_exp: Tensor,
        bound_min: Tensor, bound_max: Tensor, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return wrap_nki(attention_bwd)[cores](
            q, k, v, output, grad, log_sum_exp, bound_min=bound_min, bound_max=bound_max, use_causal_mask=True,
            mixed_precision=True, softmax_scale=scale,
        )  # fmt: skip

    return KernelAttention(forward, backward)


def choose_attention(
    heads: int, kv_heads: int, head_dim: int, seq_len: int, dtype: torch.dtype, device: torch.device
) -> tuple[Attention, str]:
    """nkilib's kernels where they are installed, take these sizes and agree with the masked product, else that.

    Returns the function, and for the log its name and the reason. heads, kv_heads: of one rank. The kernels are tried
    on the device once, forward and backward, before anything depends on them.
    """
    if seq_len % TILE or seq_len > LONGEST or head_dim > LARGEST_HEAD:
        return masked_product, (
            f"masked product (nkilib's kernels take multiples of {TILE} tokens up to {LONGEST} and heads up to "
            f"{LARGEST_HEAD}; here are {seq_len} and {head_dim})"
        )
    try:
        kernels = nkilib_kernels()
        difference = _difference(kernels, heads, kv_heads, head_dim, dtype, device)
    except ImportError as error:
        return masked_product, f"masked product (nkilib's kernels are not installed: {error})"
    except Exception as error:  # whatever the compiler or the runtime raises
        return masked_product, f"masked product (nkilib's kernels failed: {str(error).strip().splitlines()[0]})"
    if not difference <= CHECK_TOLERANCE:
        return masked_product, f"masked product (nkilib's kernels differ from it by {difference:.1e})"
    return (
        kernels,
        f"nkilib's attention_cte and attention_bwd (they differ from the masked product by {difference:.1e})",
    )


def _difference(
    kernels: Attention, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> float:
    """The largest relative difference between the kernels and the masked product, of outputs and gradients."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1, count, TILE, head_dim, generator=generator).to(device, dtype)
        for count in (heads, kv_heads, kv_heads, heads)
    ]
    *inputs, grad = tensors
    documents = torch.cat([torch.full((size,), id) for id, size in ((1, 100), (2, 300), (0, TILE - 400))])
    documents = documents.to(device, torch.int32)[None]
    results = []
    for attend in (masked_product, kernels):
        copies = [x.clone().requires_grad_() for x in inputs]
        q, k, v = copies
        output = attend(q, k, v, documents, head_dim**-0.5)
        output.backward(grad)
        results.append([output.detach(), *(x.grad for x in copies if x.grad is not None)])
    return max(
        float((found.float() - expected.float()).norm() / expected.float().norm())
        for expected, found in zip(*results, strict=True)
    )
