"""What vLLM's LoRA kernels on a CPU do for requests without an adapter, corrected. Imported by vLLM's workers alone.

In a batch that mixes requests with and without an adapter, these kernels read the index of "no adapter", -1, as the
last slot: the base model's requests are answered with the adapter that is there (vllm issue 48421). An adapter that was
unloaded stays in its slot, so the last one can be taken even if fewer adapters are served than there are slots.
"""

from torch import Tensor
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu

_shrink = lora_ops.bgmv_shrink


def bgmv_shrink(
    inputs: Tensor, lora_b_weights: Tensor, output_tensor: Tensor, lora_indices_tensor: Tensor, scaling: float = 1.0
) -> None:
    """vLLM's scaling · A(x) of each token, with zeros for tokens without an adapter: their B(A(x)) is 0 then too.

    The arguments have vLLM's names. inputs: (tokens, in); lora_b_weights: every slot's A, (slots, 1, r, in);
    output_tensor: (tokens, r), written; lora_indices_tensor: (tokens,), slots, -1 for none.
    """
    _shrink(inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling)
    output_tensor[lora_indices_tensor < 0] = 0


lora_ops.bgmv_shrink = punica_cpu.bgmv_shrink = bgmv_shrink


class WorkerExtension:
    """For vLLM's --worker-extension-cls, which imports this module in each worker. It adds nothing itself."""
