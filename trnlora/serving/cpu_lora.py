"""vLLM's LoRA kernels on a CPU: one product per adapter in place of one per token. Imported by vLLM's workers alone.

For each token, vLLM 0.32's kernels (vllm/lora/ops/torch_ops/lora_ops.py) copy the weights of its adapter, and multiply
them by that one token: answers with an adapter come at a sixth of the base model's speed. Here all tokens of an
adapter are multiplied by its weights at once.

Those kernels also read the index of "no adapter", -1, as the last slot: the base model's requests are answered with the
adapter that is there (vllm issue 48421). An adapter that was unloaded stays in its slot, so the last one can be taken
even if fewer adapters are served than there are slots. Here tokens without an adapter are left alone.
"""

from collections.abc import Iterator

from torch import Tensor
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu


def by_slot(slots: Tensor) -> Iterator[tuple[int, Tensor | None]]:
    """(slot, its tokens; None: all of them) for each adapter of the batch. slots: (tokens,), -1 for none."""
    first = int(slots[0])
    if bool((slots == first).all()):
        found: list[tuple[int, Tensor | None]] = [(first, None)]
    else:
        found = [(slot, (slots == slot).nonzero().squeeze(1)) for slot in slots.unique().tolist()]
    return ((slot, tokens) for slot, tokens in found if slot >= 0)


def bgmv_shrink(
    inputs: Tensor, lora_b_weights: Tensor, output_tensor: Tensor, lora_indices_tensor: Tensor, scaling: float = 1.0
) -> None:
    """vLLM's scaling · A(x) of each token, with zeros for tokens without an adapter: their B(A(x)) is 0 then too.

    The arguments have vLLM's names. inputs: (tokens, in); lora_b_weights: every slot's A, (slots, 1, r, in);
    output_tensor: (tokens, r), written; lora_indices_tensor: (tokens,), slots, -1 for none.
    """
    output_tensor.zero_()
    _add_products(output_tensor, inputs, lora_b_weights, lora_indices_tensor, scaling)


def bgmv_expand_slice(
    inputs: Tensor,
    lora_b_weights: Tensor,
    output_tensor: Tensor,
    lora_indices_tensor: Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """B(inputs) of each token, added to a slice of its outputs, or written there.

    The arguments have vLLM's names. inputs: (tokens, r); lora_b_weights: every slot's B, (slots, 1, out, r);
    output_tensor: (tokens, outputs), of which `slice_size` from `slice_offset` on are these.
    """
    outputs = output_tensor[:, slice_offset : slice_offset + slice_size]
    if not add_inputs:
        outputs.zero_()
    _add_products(outputs, inputs, lora_b_weights, lora_indices_tensor, 1.0)


def _add_products(outputs: Tensor, inputs: Tensor, weights: Tensor, slots: Tensor, factor: float) -> None:
    """outputs (tokens, out) += factor · inputs (tokens, in) @ the transpose of their slot's weight (out, in)."""
    for slot, tokens in by_slot(slots):
        weight = weights[slot].flatten(0, -2).to(outputs.dtype)
        if tokens is None:
            outputs.addmm_(inputs.to(outputs.dtype), weight.T, alpha=factor)
        else:
            outputs.index_add_(0, tokens, inputs[tokens].to(outputs.dtype) @ weight.T, alpha=factor)


lora_ops.bgmv_shrink = punica_cpu.bgmv_shrink = bgmv_shrink
lora_ops.bgmv_expand_slice = punica_cpu.bgmv_expand_slice = bgmv_expand_slice


class WorkerExtension:
    """For vLLM's --worker-extension-cls, which imports this module in each worker. It adds nothing itself."""
