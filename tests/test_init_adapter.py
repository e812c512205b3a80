"""lora.init_adapter: adapters that do not fit are refused before the ranks start; the others are cut for the ranks."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import lora_params, write_adapter
from support.sharded import conversion

from trnlora.errors import UserError
from trnlora.model.config import ModelConfig
from trnlora.model.targets import TARGETS
from trnlora.weights.adapter_shards import rank_part
from trnlora.weights.peft_export import peft_adapter
from trnlora.weights.peft_folder import check_init_adapter, read_init_adapter

LORA = lora_params(r=8, lora_alpha=16, share_a=False)


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on all linear layers, rank 8, alpha 16, as PEFT saves it."""
    return write_adapter(tiny_llama, tmp_path_factory.mktemp("adapter") / "peft", r=8, targets=list(TARGETS))


@pytest.mark.parametrize("sharding", [(1, 1, "trn2"), (3, 1, "trn2"), (6, 2, "trn2"), (6, 2, "trn1")])
def test_it_is_cut_for_the_ranks(adapter: Path, tiny_llama: Path, sharding: tuple[int, int, str]) -> None:
    """Cut and put together again, it has the same values."""
    config, convert = ModelConfig.from_folder(tiny_llama), conversion(*sharding)
    check_init_adapter(adapter, config, LORA)
    shards: list[dict[str, Any]] = [{} for _ in range(convert.tp_size)]
    for tensor, whole in read_init_adapter(adapter, config, LORA):
        for rank, shard in enumerate(shards):
            part = rank_part(tensor, whole, config, convert, rank)
            shard[tensor.nxd_key] = part if tensor.nxd_key not in shard else torch.cat([shard[tensor.nxd_key], part])
    found, expected = peft_adapter(shards, config, convert, LORA), load_file(adapter / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("config", "lora", "message"),
    [
        ({"r": 4}, {}, r"adapter_config\.json has r 4: set lora\.r to it \(it is 8\)"),
        (
            {"lora_alpha": 7},
            {},
            "has lora_alpha 7 and use_rslora False: set lora.lora_alpha and lora.use_rslora",
        ),
        ({"use_rslora": True}, {}, "has lora_alpha 16 and use_rslora True"),
        ({"peft_type": "IA3"}, {}, "has peft_type IA3, not LORA"),
        ({"use_dora": True, "modules_to_save": ["lm_head"]}, {}, "has use_dora, modules_to_save, which cannot be"),
        ({}, {"share_a": True}, "q_proj.lora_A.weight and .*k_proj.lora_A.weight .* differ, as PEFT trains them: set"),
        (
            {},
            {"target_modules": ["qkv_proj"]},
            r"none \(16 such tensors\).*target_modules q_proj, k_proj, v_proj",
        ),
    ],
)
def test_another_adapter_is_refused(
    adapter: Path, tiny_llama: Path, tmp_path: Path, config: dict[str, Any], lora: dict[str, Any], message: str
) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | config), "utf-8")
    with pytest.raises(UserError, match=message):
        check_init_adapter(folder, ModelConfig.from_folder(tiny_llama), LORA.model_copy(update=lora))


def test_damaged_weights_are_refused(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    config = ModelConfig.from_folder(tiny_llama)
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, weights)
    with pytest.raises(UserError, match="holds NaN or Inf: choose another"):
        check_init_adapter(folder, config, LORA)
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(UserError, match="is not a valid safetensors file"):
        check_init_adapter(folder, config, LORA)
    weights.unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is missing: save the adapter again with PEFT"):
        check_init_adapter(folder, config, LORA)
