"""Training with NxD on torch_xla: model, groups, strategy, adapter. See `trnlora.backends.training.TrainingBackend`.

Written against neuronx_distributed 0.18 (Neuron SDK 2.29). tests/neuron runs this file against NxD's own Python code
and torch_xla on a CPU; no part of it has been run on a device.
"""

import os
import warnings
from pathlib import Path
from typing import Any

import neuronx_distributed as nxd
import torch
import torch.distributed as dist
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr
from neuronx_distributed.parallel_layers import parallel_state as state
from neuronx_distributed.utils import cpu_mode
from pytorch_lightning.strategies import ModelParallelStrategy
from torch_xla.distributed.parallel_loader import MpDeviceLoader

from trnlora.backends.accelerator import NeuronCoreAccelerator
from trnlora.backends.nxd import NxdBackend
from trnlora.errors import UserError
from trnlora.model.config import ModelConfig
from trnlora.model.decoder import DecoderLM
from trnlora.model.lora import adapter_state, add_lora
from trnlora.params import Params
from trnlora.weights.storage import LORA_TAG, PRETRAINED_TAG, open_rank_file, rank_file, save_rank

SUM_DTYPE = torch.float32  # Neuron has no float64
GROUPS_CARRY_OBJECTS = False


def computes() -> bool:
    return "NEURON_EXTRACT_GRAPHS_ONLY" not in os.environ  # neuron_parallel_compile sets it


def build_model(
    mesh: "NxdMesh", params: Params, config: ModelConfig, shards: Path, kv_groups: list[list[int]]
) -> DecoderLM:
    """As `TrainingBackend.build_model`. Raises UserError also when NxD's KV groups are not `kv_groups`."""
    _check_kv_groups(kv_groups)
    dtype = getattr(torch, params.model.dtype)
    backend = NxdBackend(params.neuron, dtype)
    model = DecoderLM.empty(config, backend, params.convert.kv_size_multiplier)
    with open_rank_file(rank_file(shards, PRETRAINED_TAG, backend.tp_rank)) as stored:
        model.check_shard({name: tensor.shape for name, tensor in stored.items()})
    model.to(dtype).to_empty(device=xm.xla_device())
    nxd.load_checkpoint(str(shards), tag=PRETRAINED_TAG, model=model, strict=True)
    add_lora(model, params.lora)
    model.to(xm.xla_device())  # LoRA's layers
    return model


def _check_kv_groups(kv_groups: list[list[int]]) -> None:
    """Raise UserError unless NxD's KV groups, which it makes independently of its tensor-parallel groups, are these.

    It adds up the gradients of k and v over them: gradients of different heads, if the two disagree.
    """
    ranks = next(group for group in state.get_tensor_model_parallel_replica_groups() if dist.get_rank() in group)
    expected = {tuple(ranks[rank] for rank in group) for group in kv_groups}
    found = {tuple(group) for group in state.get_kv_shared_replica_groups() if group[0] in ranks}
    if found != expected:
        raise UserError(
            f"NxD adds KV gradients over the ranks {sorted(found)}, equal heads are on {sorted(expected)}: "
            "run on the hardware that convert.hw_backend names, or choose another convert.tp_size"
        )


def save_adapter(folder: Path, model: DecoderLM) -> None:
    if state.get_data_parallel_rank() == 0:  # replicas hold equal adapters
        adapter = {name: tensor.cpu() for name, tensor in adapter_state(model).items()}
        save_rank(rank_file(folder, LORA_TAG, model.backend.tp_rank), adapter)


def create_groups(params: Params) -> "NxdMesh":
    """NxD's groups over the ranks of the process group, which must exist."""
    state.initialize_model_parallel(
        tensor_model_parallel_size=params.convert.tp_size,
        # Which cores are neighbours depends on it: with 2, tp 32 on 64 cores, the replicas are ranks 0…15, 48…63 and
        # 16…47. NxD's default, 1, gives 0…31 and 32…63, which it says cannot talk to each other (parallel_state.py).
        lnc_size=params.neuron.logical_core_size,
    )
    state.initialize_kv_group(params.convert.kv_size_multiplier)
    return NxdMesh()


class NxdMesh:
    """The part of torch's DeviceMesh that the trainer uses, over NxD's groups. Without `dim`, for both dims."""

    def __init__(self, dim: str | None = None):
        self.dim = dim

    def __getitem__(self, dim: str) -> "NxdMesh":
        return NxdMesh(dim)

    def get_group(self) -> dist.ProcessGroup:
        if self.dim == "data_parallel":
            return state.get_data_parallel_group()
        return state.get_tensor_model_parallel_group()

    def get_local_rank(self) -> int:
        """NxD's number. torch's in the group is another one where NxD does not list the ranks in ascending order."""
        if self.dim == "data_parallel":
            return state.get_data_parallel_rank()
        return state.get_tensor_model_parallel_rank()


# Lightning ----------------------------------------------------------------------------------------------------------
# NxD's own strategy needs the package `lightning` beside pytorch_lightning, and manual optimization: its precision
# plugin drops the closure in which Lightning computes the gradients. What it does with NxD is done here.


def trainer_placement(params: Params) -> dict[str, Any]:
    warnings.filterwarnings("ignore", category=FutureWarning, module="neuronx_distributed")
    return {"accelerator": NeuronAccelerator(), "strategy": NxdStrategy(params)}


class NeuronAccelerator(NeuronCoreAccelerator):
    """One logical NeuronCore per process."""

    @staticmethod
    def get_parallel_devices(devices: int) -> list[torch.device]:
        return [xm.xla_device()] * devices


class NxdStrategy(ModelParallelStrategy):
    """Lightning over NxD's data- and tensor-parallel groups."""

    def __init__(self, params: Params):
        super().__init__(data_parallel_size=params.train.dp_size, tensor_parallel_size=params.convert.tp_size)
        self.params = params

    @property
    def root_device(self) -> torch.device:
        return xm.xla_device()

    def setup_environment(self) -> None:
        self.set_world_ranks()
        if not dist.is_initialized():
            dist.init_process_group("gloo" if cpu_mode() else "xla", rank=self.global_rank, world_size=self.world_size)
        if xr.world_size() != self.world_size:
            # torch_xla's collectives would then return their input, and each rank would train its own adapter.
            raise UserError(
                f"torch_xla sees {xr.world_size()} of the {self.world_size} ranks: set neuron.python to an environment "
                "whose torch_xla and torch_neuronx are of one SDK"
            )
        self._device_mesh = create_groups(self.params)  # type: ignore[assignment]
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    def process_dataloader(self, dataloader: Any) -> MpDeviceLoader:
        """Prefetches to the device, and ends a graph after each micro-batch."""
        loader = MpDeviceLoader(dataloader, self.root_device)
        loader.dataset, loader.batch_sampler = dataloader.dataset, None  # Lightning reads them
        return loader

    def barrier(self, name: str | None = None) -> None:
        xm.rendezvous(name or "barrier")

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj  # Lightning asks for paths, which are the same on every rank
