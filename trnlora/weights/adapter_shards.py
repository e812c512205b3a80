"""The adapter as NxD saves it, one file per tensor-parallel rank: reading it, with every check, and a rank's part.

Keys are NxD's, e.g. model.layers.N.self_attn.qkv_proj.lora_A.weight; shapes and cuts are those of
`trnlora.model.targets.adapter_tensors`. All tensors are float32.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trnlora.errors import UserError
from trnlora.model.config import ModelConfig
from trnlora.model.targets import AdapterTensor, adapter_tensors, nxd_adapter_config, rank_shapes
from trnlora.model.tensors import Cut
from trnlora.params import Convert, Lora
from trnlora.readers import read_json_as
from trnlora.weights.nxd_layout import kv_replica_groups, rank_blocks
from trnlora.weights.storage import LORA_TAG, load_rank, rank_file

Shards = Sequence[dict[str, Tensor]]  # every rank's tensors, in the order of ranks


def load_adapter_shards(folder: Path, config: ModelConfig, convert: Convert, lora: Lora) -> list[dict[str, Tensor]]:
    """Every rank's adapter from NxD's paths below `folder`, checked.

    Raises UserError naming the file for a missing, unexpected or unreadable one, for keys or shapes that are not this
    run's, for NaN or Inf, for ranks that must hold equal values and do not, and for an adapter that changes nothing.
    """
    files = [rank_file(folder, LORA_TAG, rank) for rank in range(convert.tp_size)]
    _check_files(folder, files, lora)
    shards = [load_rank(file) for file in files]
    table = adapter_tensors(config, lora)
    for file, shard in zip(files, shards, strict=True):
        _check_values(file, shard, table, convert)
    _check_copies(shards, table, config, convert)
    if not any(tensor.any() for shard in shards for name, tensor in shard.items() if ".lora_B." in name):
        raise UserError(
            f"every lora_B in {folder} is zero, so the adapter changes nothing: check train.lr and the data"
        )
    return shards


def rank_part(tensor: AdapterTensor, whole: Tensor, config: ModelConfig, convert: Convert, rank: int) -> Tensor:
    """The part of `whole`, which has tensor.shape, that `rank` holds."""
    blocks = rank_blocks(tensor.cut, tensor.shape[tensor.dim], config, convert, rank)
    return torch.cat([whole.narrow(tensor.dim, start, stop - start) for start, stop in blocks], dim=tensor.dim)


def _check_files(folder: Path, files: list[Path], lora: Lora) -> None:
    unexpected = sorted(set(files[0].parent.glob("*")) - set(files))
    if unexpected:
        raise UserError(f"{unexpected[0]} does not belong to a run of tp_size {len(files)}: rerun finetune_lora")
    found = read_json_as(folder / "adapter_config.json", dict[str, Any], ": rerun finetune_lora")
    for key, value in nxd_adapter_config(lora).items():
        if found.get(key) != value:
            raise UserError(
                f"{folder}/adapter_config.json has {key} {found.get(key)}, params.yaml {value}: rerun finetune_lora"
            )


def _check_values(file: Path, shard: dict[str, Tensor], table: list[AdapterTensor], convert: Convert) -> None:
    """Names, shapes, dtype and finiteness of one rank's tensors."""
    expected = rank_shapes(table, convert.tp_size, convert.kv_size_multiplier)
    shapes = {name: tuple(tensor.shape) for name, tensor in shard.items()}
    if shapes != expected:
        name = min(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
        raise UserError(
            f"{file}: {name} has shape {shapes.get(name, 'none')}, expected {expected.get(name, 'none')}: "
            "rerun finetune_lora with these params"
        )
    for name, tensor in shard.items():
        if tensor.dtype != torch.float32:
            raise UserError(f"{file}: {name} is {tensor.dtype}, expected torch.float32: rerun finetune_lora")
        if not tensor.isfinite().all():
            raise UserError(f"{file}: {name} holds NaN or Inf: lower train.lr and rerun finetune_lora")


def _check_copies(shards: Shards, table: list[AdapterTensor], config: ModelConfig, convert: Convert) -> None:
    """Ranks that hold copies of the same tensor must hold equal values."""
    groups_of = {Cut.WHOLE: [list(range(len(shards)))], Cut.KV_ROWS: kv_replica_groups(config, convert)}
    for tensor in table:
        for first, *others in groups_of.get(tensor.cut, []):
            for rank in others:
                if not torch.equal(shards[first][tensor.nxd_key], shards[rank][tensor.nxd_key]):
                    raise UserError(
                        f"{tensor.nxd_key} differs between ranks {first} and {rank}, which must hold the same values: "
                        "gradients were not reduced over them; train on the hardware that convert.hw_backend names"
                    )
