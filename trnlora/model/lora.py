"""LoRA on the decoder's linear layers, as NxD has it: the layers, their initial values, and the adapter's tensors.

Source: NxD 0.18 (SDK 2.29), modules/lora/tp_layer.py. `trnlora.model.targets` lists the tensors and how they are cut.
The adapter is float32 whatever the model's dtype.
"""

import math

import torch
from torch import Tensor, nn

from trnlora.model.config import ModelConfig
from trnlora.model.decoder import Attention, DecoderLM
from trnlora.model.parallel import Backend
from trnlora.params import Lora


class LoraGQAQKVParallelLinear(nn.Module):
    """base(x) + lora_alpha / r · B(A(dropout(x))) for q, k and v: one A that they share, and a B for each."""

    def __init__(
        self, base_layer: nn.Module, config: ModelConfig, kv_size_multiplier: int, lora: Lora, backend: Backend
    ):
        super().__init__()
        self.base_layer = base_layer
        self.scaling = lora.lora_alpha / lora.r
        self.lora_dropout = nn.Dropout(lora.lora_dropout)
        self.lora_A = nn.Linear(config.hidden_size, lora.r, bias=False)
        self.lora_B = backend.gqa_qkv_linear(lora.r, (config.q_size, config.kv_size), kv_size_multiplier)
        for weight in self.lora_B.parameters():
            nn.init.zeros_(weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # A is whole on every rank and B is cut. B's layer adds up the ranks' gradients in the backward pass, so A's
        # gradient is whole too. Dropout draws the same mask on every tensor-parallel rank: they share a seed.
        low = self.lora_A(self.lora_dropout(x.float()))  # (B, T, r)
        q, k, v = self.base_layer(x)
        delta_q, delta_k, delta_v = self.lora_B(low * self.scaling)
        return q + delta_q.to(q.dtype), k + delta_k.to(k.dtype), v + delta_v.to(v.dtype)


def add_lora(model: DecoderLM, lora: Lora) -> None:
    """Wrap the targets of every layer in place. `init_lora_a` then gives all ranks the same lora_A."""
    for attention in (module for module in model.modules() if isinstance(module, Attention)):
        attention.qkv_proj = LoraGQAQKVParallelLinear(
            attention.qkv_proj, model.config, model.kv_size_multiplier, lora, model.backend
        )


def init_lora_a(model: DecoderLM, seed: int) -> None:
    """Initialize every lora_A as nn.Linear, NxD and PEFT do (Kaiming uniform), from a dedicated generator.

    So it has the same values on every rank and every backend.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            a = torch.empty(parameter.shape)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            parameter.data.copy_(a)


def adapter_state(model: DecoderLM) -> dict[str, Tensor]:
    """This rank's part of the adapter under NxD's keys."""
    return {name: p.detach() for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}
