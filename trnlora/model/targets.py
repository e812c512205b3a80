"""The one table of what LoRA trains: the decoder's linear layers, by NxD's names and PEFT's, and the adapter's tensors.

The layers, the initial values, the gradient norm, the checks of adapter shards, the PEFT export, the plan and the
serving checks all read it. Pure arithmetic: no torch.

NxD (0.18, modules/lora/tp_layer.py, `LoraGQAQKVParallelLinear`) trains q, k and v as one layer with a shared lora_A.
"""

import dataclasses
from collections.abc import Iterable

from trnlora.model.config import ModelConfig
from trnlora.model.tensors import Cut, model_tensors
from trnlora.params import Lora


@dataclasses.dataclass(frozen=True)
class LoraTarget:
    """A linear layer of NxD's decoder that LoRA trains, with one lora_A and a lora_B for each HF layer that it holds.

    `projections`: for each of HF's linear layers, its name and the name of its tensor within NxD's lora_B.
    """

    name: str  # NxD's, as lora.target_modules has it
    block: str  # the module of a decoder layer that holds it
    projections: tuple[tuple[str, str], ...]


TARGETS = {
    target.name: target
    for target in (
        LoraTarget("qkv_proj", "self_attn", (("q_proj", "weight_q"), ("k_proj", "weight_k"), ("v_proj", "weight_v"))),
    )
}


def peft_modules(target_modules: Iterable[str]) -> tuple[str, ...]:
    """PEFT's names of the linear layers that these targets hold, e.g. q_proj, k_proj, v_proj for qkv_proj."""
    return tuple(hf_name for name in target_modules for hf_name, _ in TARGETS[name].projections)


@dataclasses.dataclass(frozen=True)
class AdapterTensor:
    """One tensor of the adapter under NxD's key, float32, and how it is cut over the tensor-parallel ranks.

    shape: the whole tensor's, lora_A (r, inputs) and lora_B (outputs, r). peft_keys: PEFT's tensors that get its
    values, several where NxD shares one lora_A.
    """

    nxd_key: str
    shape: tuple[int, int]
    cut: Cut
    peft_keys: tuple[str, ...]

    def rank_shape(self, tp_size: int, kv_size_multiplier: int) -> tuple[int, int]:
        """The shape of one rank's part."""
        rows, columns = self.shape
        if self.cut is Cut.WHOLE:
            return rows, columns
        return rows * self.copies(kv_size_multiplier) // tp_size, columns

    def copies(self, kv_size_multiplier: int) -> int:
        """On how many ranks each row of a cut tensor is. (A whole tensor is on every rank.)"""
        return kv_size_multiplier if self.cut is Cut.KV_ROWS else 1


def adapter_tensors(config: ModelConfig, target_modules: Iterable[str], r: int) -> list[AdapterTensor]:
    """The adapter's tensors in the order of the model."""
    base = {tensor.hf_key: tensor for tensor in model_tensors(config)}
    table = []
    for index in range(config.num_hidden_layers):
        for target in (TARGETS[name] for name in target_modules):
            block = f"model.layers.{index}.{target.block}"
            weights = [base[f"{block}.{hf_name}.weight"] for hf_name, _ in target.projections]
            peft = [f"base_model.model.{block}.{hf_name}" for hf_name, _ in target.projections]
            nxd = f"{block}.{target.name}"
            table.append(
                AdapterTensor(
                    f"{nxd}.lora_A.weight", (r, weights[0].shape[1]), Cut.WHOLE,
                    tuple(f"{module}.lora_A.weight" for module in peft),
                )
            )  # fmt: skip
            table += [
                AdapterTensor(f"{nxd}.lora_B.{name}", (weight.shape[0], r), weight.cut, (f"{module}.lora_B.weight",))
                for (_, name), weight, module in zip(target.projections, weights, peft, strict=True)
            ]
    return table


def trainable_parameters(table: Iterable[AdapterTensor]) -> int:
    """Number of trainable values of the whole adapter: each counts once, however many ranks hold a copy."""
    return sum(tensor.shape[0] * tensor.shape[1] for tensor in table)


def trainable_parameters_per_rank(table: Iterable[AdapterTensor], tp_size: int, kv_size_multiplier: int) -> int:
    """Number of trainable values on one rank."""
    shapes = (tensor.rank_shape(tp_size, kv_size_multiplier) for tensor in table)
    return sum(rows * columns for rows, columns in shapes)


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
