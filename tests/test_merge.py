"""The merged model: logits and weights equal PEFT's merge."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.adapters import lora_params
from support.models import FAMILIES
from transformers import AutoModelForCausalLM

from trnlora.model.targets import TARGETS
from trnlora.weights.merge_adapter import write_merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_logits_equal_pefts_merge(
    family: str, family_model: Callable[[str], Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    model = tmp_path / "model"
    shutil.copytree(family_model(family), model)
    save_file({k: t.to(dtype) for k, t in load_file(model / "model.safetensors").items()}, model / "model.safetensors")
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    peft.save_pretrained(str(tmp_path / "adapter"))

    (tmp_path / "merged").mkdir()
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    lora = lora_params()
    write_merged(model, tmp_path / "merged", adapter, lora, buffer_bytes=20_000)  # several blocks per tensor

    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    expected = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, expected(ids).logits, atol=5e-5, rtol=1e-5)  # logits reach 15
        plain = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)(ids).logits
        assert (found(ids).logits - plain).abs().max() > 0.1
