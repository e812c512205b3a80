"""The one table of what LoRA trains: the decoder's linear layers under each library's names, and the adapter's tensors.

The layers, the initial values, the gradient norm, the checks of adapter shards, the PEFT export, the plan and the
serving arguments all read it. Pure arithmetic: no torch. docs/adding_a_lora_target.md says how to add one.

NxD (0.18, modules/lora/tp_layer.py) trains q, k and v as one layer with a shared lora_A, and so gate and up. Layers
that are cut by rows (column-parallel: q, k, v, gate, up) have a whole lora_A and a cut lora_B; layers that are cut by
columns (row-parallel: o, down) have a cut lora_A and a whole lora_B.
"""

import dataclasses
from collections.abc import Iterable
from typing import Literal

from trnlora.model.config import ModelConfig
from trnlora.model.tensors import Cut, model_tensors
from trnlora.params import Lora


@dataclasses.dataclass(frozen=True)
class LoraTarget:
    """A linear layer of HF's decoder that LoRA can train."""

    name: str  # HF's and PEFT's
    block: str  # the module of a decoder layer that holds it
    fused_layer: str  # the layer that holds it in NxD's decoder, and in vLLM's
    lora_b: str  # the tensor of NxD's lora_B that holds its rows


# In the order in which NxD's and vLLM's fused layers hold them.
TARGETS = {
    target.name: target
    for target in (
        LoraTarget("q_proj", "self_attn", "qkv_proj", "weight_q"),
        LoraTarget("k_proj", "self_attn", "qkv_proj", "weight_k"),
        LoraTarget("v_proj", "self_attn", "qkv_proj", "weight_v"),
        LoraTarget("o_proj", "self_attn", "o_proj", "weight"),
        LoraTarget("gate_proj", "mlp", "gate_up_proj", "weight"),
        LoraTarget("up_proj", "mlp", "gate_up_proj", "weight"),
        LoraTarget("down_proj", "mlp", "down_proj", "weight"),
    )
}


def peft_modules(target_modules: Iterable[str] | Literal["all-linear"]) -> tuple[str, ...]:
    """PEFT's names of the linear layers that lora.target_modules means, in the order of TARGETS.

    NxD's name qkv_proj stands for q_proj, k_proj and v_proj.
    """
    if target_modules == "all-linear":
        return tuple(TARGETS)
    wanted = set(target_modules)
    return tuple(
        target.name
        for target in TARGETS.values()
        if target.name in wanted or (target.fused_layer == "qkv_proj" and "qkv_proj" in wanted)
    )


def fused_layers(modules: Iterable[str]) -> tuple[str, ...]:
    """NxD's and vLLM's names of the layers that hold these linear layers of PEFT's, each once, in the order given."""
    return tuple(dict.fromkeys(TARGETS[module].fused_layer for module in modules))


@dataclasses.dataclass(frozen=True)
class AdapterTensor:
    """One tensor of the adapter, float32, and how it is cut over the tensor-parallel ranks.

    shape: the whole tensor's, lora_A (r, inputs) and lora_B (outputs, r). peft_keys: PEFT's tensors that have its
    values, several where a lora_A is shared. Several tensors may have one `nxd_key`: a rank's parts of them are then
    concatenated along dim 0, in the table's order.
    """

    nxd_key: str
    shape: tuple[int, int]
    cut: Cut
    peft_keys: tuple[str, ...]

    @property
    def dim(self) -> int:
        """The dimension along which a rank's blocks are put together."""
        return self.cut.dim or 0

    def copies(self, kv_size_multiplier: int) -> int:
        """On how many ranks each row of a cut tensor is. (A whole tensor is on every rank.)"""
        return kv_size_multiplier if self.cut is Cut.KV_ROWS else 1


def adapter_tensors(config: ModelConfig, lora: Lora) -> list[AdapterTensor]:
    """The adapter's tensors in the order of the model."""
    base = {tensor.hf_key: tensor for tensor in model_tensors(config)}
    modules = peft_modules(lora.target_modules)
    table: list[AdapterTensor] = []
    for index in range(config.num_hidden_layers):
        for layer in fused_layers(modules):
            targets = [TARGETS[module] for module in modules if TARGETS[module].fused_layer == layer]
            block = f"model.layers.{index}.{targets[0].block}"
            weights = [base[f"{block}.{target.name}.weight"] for target in targets]
            peft = [f"base_model.model.{block}.{target.name}" for target in targets]
            input_cut = weights[0].cut if weights[0].cut.dim == 1 else Cut.WHOLE
            inputs = (lora.r, weights[0].shape[1])
            keys = [f"{module}.lora_A.weight" for module in peft]
            for shared in [keys] if lora.share_a else [[key] for key in keys]:
                table.append(AdapterTensor(f"{block}.{layer}.lora_A.weight", inputs, input_cut, tuple(shared)))
            for target, weight, module in zip(targets, weights, peft, strict=True):
                output_cut = Cut.WHOLE if weight.cut.dim == 1 else weight.cut
                key = f"{block}.{layer}.lora_B.{target.lora_b}"
                outputs = (weight.shape[0], lora.r)
                table.append(AdapterTensor(key, outputs, output_cut, (f"{module}.lora_B.weight",)))
    return table


def rank_shapes(table: Iterable[AdapterTensor], tp_size: int, kv_size_multiplier: int) -> dict[str, tuple[int, ...]]:
    """The shapes of one rank's tensors, by NxD's key."""
    shapes: dict[str, list[int]] = {}
    for tensor in table:
        part = list(tensor.shape)
        if tensor.cut is not Cut.WHOLE:
            part[tensor.dim] = part[tensor.dim] * tensor.copies(kv_size_multiplier) // tp_size
        if tensor.nxd_key in shapes:
            shapes[tensor.nxd_key][tensor.dim] += part[tensor.dim]
        else:
            shapes[tensor.nxd_key] = part
    return {key: tuple(shape) for key, shape in shapes.items()}


def trainable_parameters(table: Iterable[AdapterTensor]) -> int:
    """Number of trainable values of the whole adapter: each counts once, however many ranks hold a copy."""
    return sum(tensor.shape[0] * tensor.shape[1] for tensor in table)


def trainable_parameters_per_rank(table: Iterable[AdapterTensor], tp_size: int, kv_size_multiplier: int) -> int:
    """Number of trainable values on one rank."""
    return sum(rows * columns for rows, columns in rank_shapes(table, tp_size, kv_size_multiplier).values())


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
        "target_modules": list(fused_layers(peft_modules(lora.target_modules))),
        "use_rslora": lora.use_rslora,
    }
