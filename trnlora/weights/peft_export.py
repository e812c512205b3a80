"""The adapter in PEFT's form, which PEFT, vLLM and NxDI load: tensors put together from the ranks, and the config."""

from collections import defaultdict
from typing import Any

from torch import Tensor

from trnlora.model.config import ModelConfig
from trnlora.model.targets import adapter_tensors, peft_modules
from trnlora.params import Convert, Lora
from trnlora.weights.adapter_shards import Shards
from trnlora.weights.nxd_layout import rank_blocks


def peft_adapter(shards: Shards, config: ModelConfig, convert: Convert, lora: Lora) -> dict[str, Tensor]:
    """PEFT's tensors from every rank's: each linear layer with its own copy of a shared lora_A, in HF's order.

    Keys: base_model.model.model.layers.N.self_attn.q_proj.lora_A.weight (r, inputs), …lora_B.weight (outputs, r), and
    so on for the modules that were trained.
    """
    tensors: dict[str, Tensor] = {}
    taken: dict[tuple[int, str], int] = defaultdict(int)  # of a rank's tensor, which may hold several of PEFT's
    for tensor in adapter_tensors(config, lora):
        whole = shards[0][tensor.nxd_key].new_full(tensor.shape, float("nan"))
        for rank, shard in enumerate(shards):
            held = shard[tensor.nxd_key]
            for start, stop in rank_blocks(tensor.cut, tensor.shape[tensor.dim], config, convert, rank):
                first, size = taken[rank, tensor.nxd_key], stop - start
                whole.narrow(tensor.dim, start, size).copy_(held.narrow(tensor.dim, first, size))
                taken[rank, tensor.nxd_key] += size
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
        use_rslora=lora.use_rslora,
        lora_dropout=lora.lora_dropout,
        target_modules=list(peft_modules(lora.target_modules)),
        bias="none",
    ).to_dict()
    # PEFT holds the modules as a set, whose order changes from process to process.
    return {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(config.items())}
