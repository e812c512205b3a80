"""Params of LoRA, and adapters for the tiny Llama, saved by PEFT, that change its answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trnlora.params import Lora


def lora_params(**values: Any) -> Lora:
    """The section `lora`: rank 4 on all linear layers, without dropout; `values` override that."""
    defaults: dict[str, Any] = {
        "r": 4, "lora_alpha": 8, "use_rslora": False, "lora_dropout": 0.0, "target_modules": "all-linear",
        "share_a": True, "init_adapter": None,
    }  # fmt: skip
    return Lora(**{**defaults, **values})


def write_adapter(
    model: Path,
    folder: Path,
    r: int = 16,
    targets: Sequence[str] = ("q_proj", "k_proj", "v_proj"),
    scale: float = 0.5,
    seed: int = 17,
    **config: Any,
) -> Path:
    """Write an adapter to `folder` as PEFT does. lora_B is normal with standard deviation `scale` (0: no effect)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    lora = LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(targets), task_type="CAUSAL_LM", **config)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        peft_model = get_peft_model(base, lora)  # draws lora_A
        for name, weight in peft_model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=scale)
    peft_model.save_pretrained(str(folder))
    return folder
