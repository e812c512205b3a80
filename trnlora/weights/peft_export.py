"""The adapter in PEFT's form, which PEFT, vLLM and NxDI load: tensors put together from the ranks, and the config."""

from typing import Any

from torch import Tensor

from trnlora.model.config import ModelConfig
from trnlora.model.targets import adapter_tensors, peft_modules
from trnlora.params import Convert, Lora
from trnlora.weights.adapter_shards import Shards
from trnlora.weights.nxd_layout import rank_blocks


def peft_adapter(shards: Shards, config: ModelConfig, convert: Convert, lora: Lora) -> dict[str, Tensor]:
    """PEFT's tensors from every rank's: each projection with its own copy of a shared lora_A, rows in HF's order.

    Keys: base_model.model.model.layers.N.self_attn.{q,k,v}_proj.lora_A.weight (r, H) and lora_B.weight (outputs, r).
    """
    tensors: dict[str, Tensor] = {}
    for tensor in adapter_tensors(config, lora.target_modules, lora.r):
        whole = shards[0][tensor.nxd_key].new_full(tensor.shape, float("nan"))
        for rank, shard in enumerate(shards):
            held, row = shard[tensor.nxd_key], 0
            for start, stop in rank_blocks(tensor.cut, tensor.shape[0], config, convert, rank):
                whole[start:stop] = held[row : row + stop - start]
                row += stop - start
        assert whole.isfinite().all(), "every row is on some rank"
        tensors |= {key: whole.clone() for key in tensor.peft_keys}
    return tensors


def peft_adapter_config(lora: Lora, model_source: str) -> dict[str, Any]:
    """A complete PEFT adapter_config.json. NxD's lacks peft_type, task_type and base_model_name_or_path."""
    from peft import LoraConfig  # imports transformers: seconds

    config = LoraConfig(
        base_model_name_or_path=model_source.removeprefix("hf://").split("@")[0],
        task_type="CAUSAL_LM",
        inference_mode=True,
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=list(peft_modules(lora.target_modules)),
        bias="none",
    ).to_dict()
    # PEFT holds the modules as a set, whose order changes from process to process.
    return {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(config.items())}
