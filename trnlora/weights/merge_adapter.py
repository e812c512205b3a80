"""Merge base and adapter into a plain HF model, tensor by tensor, for servers that cannot load LoRA."""

import contextlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trnlora.params import Lora
from trnlora.weights.reshard import each_block
from trnlora.weights.storage import HFCheckpoint, StoredTensor, copy_all_but_weights, create_hf_folder


def write_merged(model: Path, target: Path, adapter: Mapping[str, Tensor], lora: Lora, buffer_bytes: int) -> None:
    """Write `model` (an HF folder) with W + scaling · B A for each adapted W to the folder `target`.

    adapter: tensors by PEFT's keys, as `trnlora.weights.peft_export.peft_adapter` returns them. Adds in float32 and
    rounds once to the model's dtype, as PEFT's merge does. Holds only the current blocks and their float32 sums in
    memory.
    """
    copy_all_but_weights(model, target)
    with HFCheckpoint(model) as source, contextlib.ExitStack() as files:
        specs = {name: (tensor.shape, tensor.dtype) for name, tensor in source.stored.items()}
        merged = files.enter_context(create_hf_folder(target, specs))

        def move(name: str, tensor: StoredTensor, first: int, block: np.ndarray) -> int:
            tensor.read_into(first, block)
            prefix = "base_model.model." + name.removesuffix(".weight")
            if f"{prefix}.lora_A.weight" in adapter:
                lora_a = adapter[f"{prefix}.lora_A.weight"]
                lora_b = adapter[f"{prefix}.lora_B.weight"][first : first + len(block)]
                rows = torch.from_numpy(block).view(tensor.dtype)  # (rows, inputs), a view of the block
                rows.copy_(rows.float() + lora.scaling * (lora_b @ lora_a))
            merged[name].write_rows(first, block)
            return len(block)

        for _ in each_block(source.stored, move, buffer_bytes):
            pass
