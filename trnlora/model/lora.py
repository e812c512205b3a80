"""LoRA on the fused qkv projection as NxD has it: one A shared by q, k and v, a B for each.

Source: NxD 2.29, modules/lora/tp_layer.py (`LoraGQAQKVParallelLinear`). Adapter keys are NxD's:
model.layers.N.self_attn.qkv_proj.lora_A.weight (r, H), whole on every rank, and
model.layers.N.self_attn.qkv_proj.lora_B.weight_q|weight_k|weight_v (rows of this rank, r); all fp32.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trnlora.model.config import LlamaConfig
from trnlora.model.parallel import Backend
from trnlora.weights.storage import LORA_TAG, load_rank, rank_file
from trnlora.errors import UserError
from trnlora.files import read_json
from trnlora.weights.nxd_layout import heads_of_rank, kv_replica_groups
from trnlora.model.decoder import Attention, Llama
from trnlora.params import Convert, Lora


class LoraGQAQKVParallelLinear(nn.Module):
    """base(x) + lora_alpha / r · B(A(dropout(x))) for q, k and v."""

    def __init__(
        self, base_layer: nn.Module, config: LlamaConfig, kv_size_multiplier: int, lora: Lora, backend: Backend
    ):
        super().__init__()
        self.base_layer = base_layer
        self.scaling = lora.lora_alpha / lora.r
        self.lora_dropout = nn.Dropout(lora.lora_dropout)
        self.lora_A = nn.Linear(config.hidden_size, lora.r, bias=False)
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.lora_B = backend.gqa_qkv_linear(lora.r, (q_size, kv_size), kv_size_multiplier)
        for weight in self.lora_B.parameters():
            nn.init.zeros_(weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # A is whole on every rank and B cut. B's layer adds its ranks' gradients on the way back, so A's gradient
        # is whole too; dropout draws the same mask on every tensor-parallel rank, which share a seed.
        low = self.lora_A(self.lora_dropout(x.float()))  # (B, T, r)
        q, k, v = self.base_layer(x)
        delta_q, delta_k, delta_v = self.lora_B(low * self.scaling)
        return q + delta_q.to(q.dtype), k + delta_k.to(k.dtype), v + delta_v.to(v.dtype)


def add_lora(model: Llama, lora: Lora) -> None:
    """Wrap every layer's qkv_proj in place; `draw_lora_a` makes the ranks' adapters agree."""
    for attention in (module for module in model.modules() if isinstance(module, Attention)):
        attention.qkv_proj = LoraGQAQKVParallelLinear(
            attention.qkv_proj, model.config, model.kv_size_multiplier, lora, model.backend
        )


def draw_lora_a(model: Llama, seed: int) -> None:
    """Draw every A as nn.Linear, NxD and PEFT do, from a generator of its own: the same on every rank and backend."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if is_replicated(name):
            a = torch.empty(parameter.shape)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            parameter.data.copy_(a)


def adapter_state(model: Llama) -> dict[str, Tensor]:
    """This rank's adapter under NxD's keys."""
    return {name: p.detach() for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}


def is_replicated(name: str) -> bool:
    """Whether a trainable parameter is whole on every tensor-parallel rank (lora_A), not cut (lora_B)."""
    return ".lora_A." in name


def nxd_adapter_config(lora: Lora) -> dict[str, object]:
    """The adapter_config.json that NxD writes beside its shards (`LoraConfig.selected_fields_to_save`)."""
    return {
        "bias": "none",
        "init_lora_weights": "default",
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "lora_rank": lora.r,
        "merge_lora": False,
        "modules_to_save": None,
        "r": lora.r,
        "save_lora_base": False,
        "save_lora_config_adapter": False,
        "target_modules": lora.target_modules,
        "use_rslora": False,
    }


def load_adapter_shards(folder: Path, config: LlamaConfig, convert: Convert, lora: Lora) -> list[dict[str, Tensor]]:
    """Every rank's adapter from NxD's paths below `folder`, checked.

    Raises UserError naming the file for a missing, unexpected or unreadable one, for keys or shapes that are not
    this run's, NaN or Inf, values that differ between ranks that must agree, and an adapter that changes nothing.
    """
    files = [rank_file(folder, LORA_TAG, rank) for rank in range(convert.tp_size)]
    unexpected = sorted(set(files[0].parent.glob("*")) - set(files))
    if unexpected:
        raise UserError(
            f"{unexpected[0]} does not belong to a run of tp_size {convert.tp_size}: delete {folder} and rerun"
        )
    found = read_json(folder / "adapter_config.json")
    for key, value in nxd_adapter_config(lora).items():
        if found.get(key) != value:
            raise UserError(
                f"{folder}/adapter_config.json has {key} {found.get(key)}, params.yaml {value}: rerun finetune_lora"
            )
    shards = [load_rank(file) for file in files]
    expected = _adapter_shapes(config, convert, lora)
    for file, shard in zip(files, shards, strict=True):
        shapes = {name: tuple(tensor.shape) for name, tensor in shard.items()}
        if shapes != expected:
            name = min(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
            raise UserError(
                f"{file}: {name} has shape {shapes.get(name, 'none')}, expected {expected.get(name, 'none')}: "
                "rerun finetune_lora with these params"
            )
        for name, tensor in shard.items():
            if not tensor.isfinite().all():
                raise UserError(f"{file}: {name} holds NaN or Inf: lower train.lr and rerun finetune_lora")
    kv_groups = kv_replica_groups(config, convert)
    for name in expected:
        if ".lora_A." in name:
            groups = [list(range(convert.tp_size))]
        elif name.endswith(".weight_q"):
            groups = []
        else:
            groups = kv_groups
        for first, *others in groups:
            for rank in others:
                if not torch.equal(shards[first][name], shards[rank][name]):
                    raise UserError(
                        f"{name} differs between ranks {first} and {rank}, which must hold the same: gradients were "
                        "not reduced over them; train on the hardware that convert.hw_backend names"
                    )
    if not any(tensor.any() for shard in shards for name, tensor in shard.items() if ".lora_B." in name):
        raise UserError(
            f"every lora_B in {folder} is zero, so the adapter changes nothing: check train.lr and the data"
        )
    return shards


def _adapter_shapes(config: LlamaConfig, convert: Convert, lora: Lora) -> dict[str, tuple[int, int]]:
    heads = heads_of_rank(config, convert, 0)
    rows = {
        "q": len(heads.q) * config.head_dim,
        "k": len(heads.kv) * config.head_dim,
        "v": len(heads.kv) * config.head_dim,
    }
    shapes: dict[str, tuple[int, int]] = {}
    for index in range(config.num_hidden_layers):
        qkv = f"model.layers.{index}.self_attn.qkv_proj"
        shapes[f"{qkv}.lora_A.weight"] = (lora.r, config.hidden_size)
        shapes.update({f"{qkv}.lora_B.weight_{name}": (size, lora.r) for name, size in rows.items()})
    return shapes


def peft_adapter(shards: list[dict[str, Tensor]], config: LlamaConfig, convert: Convert) -> dict[str, Tensor]:
    """PEFT's tensors from every rank's: q, k and v each with a copy of the shared A, and B's rows in HF's order.

    Keys: base_model.model.model.layers.N.self_attn.{q,k,v}_proj.lora_A.weight (r, H) and lora_B.weight (rows, r).
    """
    head_dim = config.head_dim
    tensors = {}
    for index in range(config.num_hidden_layers):
        source = f"model.layers.{index}.self_attn.qkv_proj"
        target = f"base_model.model.model.layers.{index}.self_attn"
        for name, heads in (
            ("q", config.num_attention_heads), ("k", config.num_key_value_heads), ("v", config.num_key_value_heads),
        ):  # fmt: skip
            rows = shards[0][f"{source}.lora_B.weight_{name}"]
            whole = rows.new_full((heads * head_dim, rows.shape[1]), float("nan"))
            for rank, shard in enumerate(shards):
                held = heads_of_rank(config, convert, rank)
                for position, head in enumerate(held.q if name == "q" else held.kv):
                    own = shard[f"{source}.lora_B.weight_{name}"][position * head_dim : (position + 1) * head_dim]
                    whole[head * head_dim : (head + 1) * head_dim] = own
            assert whole.isfinite().all(), "every head is on some rank"
            tensors[f"{target}.{name}_proj.lora_B.weight"] = whole
            tensors[f"{target}.{name}_proj.lora_A.weight"] = shards[0][f"{source}.lora_A.weight"].clone()
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
        target_modules=["q_proj", "k_proj", "v_proj"],
        bias="none",
    ).to_dict()
    # PEFT holds the modules as a set, whose order changes from process to process.
    return {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(config.items())}
