"""Adapter shards: load_adapter_shards refuses broken ones; correct ones become a PEFT folder."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.adapters import lora_params
from support.sharded import conversion

from trnlora.errors import UserError
from trnlora.model.config import ModelConfig
from trnlora.model.targets import nxd_adapter_config
from trnlora.params import Convert
from trnlora.weights.adapter_shards import load_adapter_shards
from trnlora.weights.nxd_layout import heads_of_rank
from trnlora.weights.peft_export import peft_adapter, peft_adapter_config
from trnlora.weights.storage import LORA_TAG, load_rank, rank_file, save_rank

CONFIG = ModelConfig.from_hf(
    {
        "model_type": "llama", "vocab_size": 60, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4,
    }
)  # fmt: skip
LORA = lora_params(r=2, lora_alpha=4, target_modules=["qkv_proj"])
QKV = "model.layers.1.self_attn.qkv_proj"


def write_shards(folder: Path, convert: Convert) -> None:
    """Write shards whose lora_B rows identify their head: value = 100 · projection + head."""
    generator = torch.Generator().manual_seed(0)
    shared_a = [torch.randn(LORA.r, CONFIG.hidden_size, generator=generator) for _ in range(CONFIG.num_hidden_layers)]
    for rank in range(convert.tp_size):
        held = heads_of_rank(CONFIG, convert, rank)
        tensors = {}
        for index, lora_a in enumerate(shared_a):
            qkv = f"model.layers.{index}.self_attn.qkv_proj"
            tensors[f"{qkv}.lora_A.weight"] = lora_a
            for number, (name, heads) in enumerate((("q", held.q), ("k", held.kv), ("v", held.kv)), 1):
                rows = [torch.full((CONFIG.head_dim, LORA.r), 100.0 * number + head) for head in heads]
                tensors[f"{qkv}.lora_B.weight_{name}"] = torch.cat(rows)
        save_rank(rank_file(folder, LORA_TAG, rank), tensors)
    (folder / "adapter_config.json").write_text(json.dumps(nxd_adapter_config(LORA)))


def edit(folder: Path, rank: int, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = rank_file(folder, LORA_TAG, rank)
    tensors = {name: tensor.clone() for name, tensor in load_rank(path).items()}
    change(tensors)
    save_rank(path, tensors)


@pytest.mark.parametrize(
    ("hw_backend", "tp", "multiplier"), [("trn2", 6, 2), ("trn1", 6, 2), ("trn2", 3, 1), ("trn2", 1, 1)]
)
def test_heads_come_back_in_hf_order(tmp_path: Path, hw_backend: str, tp: int, multiplier: int) -> None:
    convert = conversion(tp, multiplier, hw_backend)
    write_shards(tmp_path, convert)
    whole = peft_adapter(load_adapter_shards(tmp_path, CONFIG, convert, LORA), CONFIG, convert, LORA)
    attention = "base_model.model.model.layers.1.self_attn"
    for number, (name, heads) in enumerate((("q", 6), ("k", 3), ("v", 3)), 1):
        lora_b = whole[f"{attention}.{name}_proj.lora_B.weight"]
        assert lora_b[:: CONFIG.head_dim, 0].tolist() == [100.0 * number + head for head in range(heads)]
    shared = [whole[f"{attention}.{name}_proj.lora_A.weight"] for name in "qkv"]
    assert torch.equal(shared[0], shared[1])
    assert len({tensor.data_ptr() for tensor in shared}) == 3  # safetensors refuses shared storage


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: rank_file(folder, LORA_TAG, 3).unlink(), "tp_rank_03_pp_rank_00.pt is missing"),
        (lambda folder: save_rank(rank_file(folder, LORA_TAG, 6), {}), "tp_rank_06.* does not belong"),
        (lambda folder: edit(folder, 1, lambda t: t.pop(f"{QKV}.lora_B.weight_k")), "weight_k has shape none"),
        (lambda folder: edit(folder, 1, lambda t: t[f"{QKV}.lora_B.weight_v"].add_(1)), "weight_v differs between"),
        (lambda folder: edit(folder, 5, lambda t: t[f"{QKV}.lora_A.weight"].add_(1)), "lora_A.weight differs between"),
        (
            lambda folder: edit(folder, 2, lambda t: t[f"{QKV}.lora_B.weight_q"].fill_(float("nan"))),
            "weight_q holds NaN",
        ),
        (lambda folder: (folder / "adapter_config.json").write_text('{"r": 8}'), "adapter_config.json has bias None"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    ],
    ids=["missing-rank", "extra-rank", "missing-key", "kv-replica", "lora-a", "nan", "other-config", "no-config"],
)  # fmt: skip
def test_broken_shards_are_named(tmp_path: Path, break_it: Callable[[Path], object], message: str) -> None:
    write_shards(tmp_path, conversion(6, 2))
    break_it(tmp_path)
    with pytest.raises(UserError, match=message):
        load_adapter_shards(tmp_path, CONFIG, conversion(6, 2), LORA)


def test_an_adapter_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, conversion(6, 2))
    for rank in range(6):
        edit(tmp_path, rank, lambda tensors: [t.zero_() for name, t in tensors.items() if ".lora_B." in name])
    with pytest.raises(UserError, match=r"every lora_B .* is zero"):
        load_adapter_shards(tmp_path, CONFIG, conversion(6, 2), LORA)


def test_the_peft_config_is_complete_and_always_the_same() -> None:
    config = peft_adapter_config(LORA, "hf://meta-llama/Meta-Llama-3-8B@62bd457")
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == "meta-llama/Meta-Llama-3-8B"
    assert config["target_modules"] == ["k_proj", "q_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    json.dumps(config)  # no sets or enums left
