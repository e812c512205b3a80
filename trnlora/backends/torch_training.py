"""Training on torch.distributed: gloo on a CPU, nccl on a GPU. See `trnlora.backends.training.TrainingBackend`."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.strategies import ModelParallelStrategy

from trnlora.backends.frozen_linear import ROW_MULTIPLE, packed_dtype
from trnlora.backends.torch import pack_frozen_weights, process_backend
from trnlora.model.config import ModelConfig
from trnlora.model.decoder import DecoderLM
from trnlora.model.lora import adapter_state, add_lora
from trnlora.params import Params
from trnlora.weights.storage import LORA_TAG, PRETRAINED_TAG, load_rank, rank_file, save_rank

SUM_DTYPE = torch.float64
GROUPS_CARRY_OBJECTS = True


def trainer_placement(params: Params) -> dict[str, Any]:
    strategy = ModelParallelStrategy(
        data_parallel_size=params.train.dp_size, tensor_parallel_size=params.convert.tp_size
    )
    return {"accelerator": "gpu" if params.backend == "cuda" else "cpu", "strategy": strategy}


def build_model(mesh: Any, params: Params, config: ModelConfig, shards: Path, kv_groups: list[list[int]]) -> DecoderLM:
    backend = process_backend(mesh["tensor_parallel"].get_group(), kv_groups, params.train.dp_size)
    file = rank_file(shards, PRETRAINED_TAG, backend.tp_rank)
    model = DecoderLM.from_shard(config, backend, params.convert.kv_size_multiplier, load_rank(file))
    if params.backend == "cpu" and params.model.dtype == "float32":
        pack(model, file, params.train.matmul_precision)
    add_lora(model, params.lora)
    model.recompute_layers = params.train.activation_checkpointing
    model.only_needed_tokens = params.lora.lora_dropout == 0
    return model


def pack(model: DecoderLM, file: Path, matmul_precision: str) -> None:
    """Pack the frozen weights as this processor multiplies fastest. file: this rank's shard.

    The head is always float32: its products are logits, in which rounding is seen most. Raises UserError as
    `packed_dtype` does.
    """
    dtype, head = packed_dtype(matmul_precision), packed_dtype("highest")
    pack_frozen_weights(model, lambda: load_rank(file), lambda name: head if name == "lm_head" else dtype)
    if dtype:
        model.row_multiple = ROW_MULTIPLE
    if dist.get_rank() == 0:
        how = f"oneDNN, weights packed in {str(dtype).removeprefix('torch.')}" if dtype else "MKL"
        print(f"matrix products: {how}", flush=True)


def save_adapter(folder: Path, model: DecoderLM) -> None:
    if dist.get_rank() < model.backend.tp_size:  # data-parallel replicas hold equal adapters
        save_rank(rank_file(folder, LORA_TAG, model.backend.tp_rank), adapter_state(model))


def computes() -> bool:
    return True
