"""Record a training step of rank 0 on torch_xla without computing it: python record_graphs.py PARAMS LAYERS FOLDER

The model has the shapes that the params file says, but only LAYERS layers and random weights. One process stands for
all ranks, so the collectives have NxD's real groups.

Writes  FOLDER/micro_batch.hlo, FOLDER/update.hlo   the graphs of a micro-batch and of the optimizer's step
        FOLDER/host.json                            fallbacks: operations that torch_xla leaves to the CPU; transfers:
                                                    how many tensors a second forward pass copies from the host
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics
import torch_xla.distributed.xla_backend  # registers the process groups
import torch_xla.runtime as xr

from trnlora.backends import nxd_training
from trnlora.model.config import ModelConfig
from trnlora.model.decoder import DecoderLM
from trnlora.model.lora import draw_dropout, whole_weights
from trnlora.params import Params, load_params
from trnlora.preflight.known_models import known_config
from trnlora.weights.nxd_layout import kv_replica_groups, shard_shapes
from trnlora.weights.storage import PRETRAINED_TAG, rank_file, save_rank


def stand_for_all_ranks(world_size: int, rank: int = 0) -> None:
    """Let this process be a rank of world_size. Nothing is computed, and nobody is waited for."""
    os.environ["TORCH_DIST_INIT_BARRIER"] = "0"
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_WORLD_SIZE": "1"}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    xr._WORLD_SIZE, xr._ORDINAL = world_size, rank
    xm.mark_step = torch_xla.sync = xm.rendezvous = lambda *unused, **unused_too: None
    dist.init_process_group("xla", store=dist.HashStore(), rank=rank, world_size=world_size)


def build_model(params: Params, config: ModelConfig, folder: Path) -> DecoderLM:
    dtype = getattr(torch, params.model.dtype)
    shard = {name: torch.randn(shape).to(dtype) for name, shape in shard_shapes(config, params.convert, 0).items()}
    save_rank(rank_file(folder, PRETRAINED_TAG, 0), shard)
    mesh = nxd_training.create_groups(params)
    model = nxd_training.build_model(mesh, params, config, folder, kv_replica_groups(config, params.convert))
    for parameter in trained(model).values():
        parameter.data = torch.randn(parameter.shape).to(parameter.device)
    return model


def trained(model: DecoderLM) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def forget_collectives() -> None:
    """As mark_step does: otherwise the next graph would begin with the collectives so far."""
    torch_xla._XLAC._set_all_reduce_token(str(xm.xla_device()), None)


def write_hlo(file: Path, tensors: list[torch.Tensor]) -> None:
    file.write_text(torch_xla._XLAC._get_xla_tensors_hlo([tensor.detach() for tensor in tensors]), "utf-8")
    forget_collectives()


def transfers_to_device() -> int:
    """Number of tensors that were copied from the host so far."""
    return int((torch_xla.debug.metrics.metric_data("TransferToDeviceTime") or [0])[0])


def main(params: Params, layers: int, folder: Path) -> None:
    stand_for_all_ranks(params.convert.tp_size * params.train.dp_size)
    known: Any = known_config(params)
    model = build_model(params, dataclasses.replace(known, num_hidden_layers=layers), folder)
    parameters = trained(model)
    forget_collectives()

    shape = (params.train.micro_batch_size, params.data.seq_len)
    ids, labels, ones = torch.randint(1000, shape), torch.randint(1000, shape), torch.ones(shape, dtype=torch.int64)
    batch = [tensor.to(xm.xla_device()) for tensor in (ids, torch.arange(shape[1]).expand(shape), ones, labels)]
    draw_dropout(model, 3, batch[-1])
    model.loss(*batch)
    before = transfers_to_device()
    model.loss(*batch)
    transfers = transfers_to_device() - before
    forget_collectives()

    loss, _ = model.loss(*batch)
    loss.backward()
    write_hlo(folder / "micro_batch.hlo", [loss, *(parameter.grad for parameter in parameters.values())])  # type: ignore[misc]

    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape).to(parameter.device)
    optimizer = model.backend.adamw(list(parameters.values()), lr=1e-4, weight_decay=0.0)
    model.backend.add_over_ranks([weight.grad for weight in whole_weights(model) if weight.grad is not None])
    if params.train.dp_size > 1:
        gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
        model.backend.add_over_replicas(gradients, nxd_training.NxdMesh("data_parallel").get_group())
    optimizer.step()
    write_hlo(folder / "update.hlo", list(parameters.values()))

    fallbacks = [name for name in torch_xla.debug.metrics.counter_names() if name.startswith("aten::")]
    (folder / "host.json").write_text(json.dumps({"fallbacks": fallbacks, "transfers": transfers}), "utf-8")


if __name__ == "__main__":
    main(load_params(Path(sys.argv[1])), int(sys.argv[2]), Path(sys.argv[3]))
