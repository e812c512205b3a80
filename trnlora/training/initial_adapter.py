"""The adapter's values before the first step: random lora_A's from a seed, or those of lora.init_adapter."""

import itertools
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from trnlora.model.decoder import DecoderLM
from trnlora.model.targets import AdapterTensor
from trnlora.params import Convert
from trnlora.weights.adapter_shards import rank_part

Values = Iterable[tuple[AdapterTensor, Tensor]]  # whole tensors, in the order of `adapter_tensors`


def random_lora_a(table: Iterable[AdapterTensor], seed: int) -> Iterator[tuple[AdapterTensor, Tensor]]:
    """Every lora_A as nn.Linear, NxD and PEFT initialize it (Kaiming uniform), from a generator of its own.

    The whole matrix is drawn, so that it has the same values however it is cut, on every backend.
    """
    generator = torch.Generator().manual_seed(seed)
    for tensor in table:
        if ".lora_A." in tensor.nxd_key:
            whole = torch.empty(tensor.shape)
            nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
            yield tensor, whole


@torch.no_grad()
def set_adapter(model: DecoderLM, values: Values, convert: Convert) -> None:
    """Copy this rank's part of `values` to the model's adapter. Tensors that are not among them keep theirs."""
    parameters = dict(model.named_parameters())
    for key, tensors in itertools.groupby(values, lambda pair: pair[0].nxd_key):
        parts = [rank_part(tensor, whole, model.config, convert, model.backend.tp_rank) for tensor, whole in tensors]
        parameters[key].copy_(torch.cat(parts))  # tensors that share a key are cut by rows or not at all
