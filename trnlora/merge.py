"""Base and adapter as one plain HF model, written tensor by tensor, for servers that cannot load LoRA."""

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from trnlora.checkpoint import HFCheckpoint, StoredTensor, create_hf_folder
from trnlora.params import Lora
from trnlora.reshard import each_block


def write_merged(model: Path, target: Path, adapter: Mapping[str, Tensor], lora: Lora, buffer_bytes: int) -> None:
    """Write `model` (an HF folder) with W + lora_alpha / r · B A for each adapted W to the folder `target`.

    adapter: PEFT's keys, as `trnlora.lora.peft_adapter` gives them. Sums are made in float32 and rounded once to the
    model's dtype, as PEFT's merge does. Memory is that of one adapted tensor, or of the blocks that are copied.
    """
    scale = lora.lora_alpha / lora.r
    for file in sorted(model.iterdir()):
        if not file.name.startswith("model"):  # config, tokenizer, chat template
            shutil.copyfile(file, target / file.name)
    with HFCheckpoint(model) as source, contextlib.ExitStack() as files:
        specs = {name: (tensor.shape, tensor.dtype) for name, tensor in source.stored.items()}
        merged = files.enter_context(create_hf_folder(target, specs))

        def move(name: str, tensor: StoredTensor, first: int, end: int) -> int:
            prefix = "base_model.model." + name.removesuffix(".weight")
            if f"{prefix}.lora_A.weight" in adapter:
                lora_a, lora_b = adapter[f"{prefix}.lora_A.weight"], adapter[f"{prefix}.lora_B.weight"][first:end]
                rows = tensor.read(first, end)
                rows = (rows.float() + scale * (lora_b @ lora_a)).to(rows.dtype)  # (rows, H)
                merged[name].write_rows(first, rows.contiguous().view(torch.uint8).view(len(rows), -1).numpy())
            else:
                merged[name].write_rows(first, tensor.read_rows(first, end))
            return end - first

        for _ in each_block(source.stored, move, buffer_bytes):
            pass
