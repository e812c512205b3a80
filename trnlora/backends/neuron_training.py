"""Training with native PyTorch on Trainium: `torch.device("neuron")`, the static form of the torch backend, compiled.

See `trnlora.backends.training.TrainingBackend`. Sources: aws-neuron-sdk, torch/guides/torch-distributed.rst and
torch/compile/reference-torch-compile.rst (SDK 2.33). tests/test_neuron_training.py runs this file on a CPU with a
stand-in for torch_neuronx, which has its names only; no part of it has been run on a device.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch_neuronx  # noqa: F401  # registers the device, the process groups and the compiler
from pytorch_lightning.accelerators import Accelerator
from pytorch_lightning.strategies import ModelParallelStrategy

from trnlora.backends.torch_static import build_static_model
from trnlora.model.config import ModelConfig
from trnlora.model.decoder import DecoderLM
from trnlora.model.lora import adapter_state
from trnlora.params import Params
from trnlora.weights.storage import LORA_TAG, rank_file, save_rank

NEURON = "neuron"  # the name of the process groups and of the compiler, and of the device:
DEVICE = torch.device(NEURON)
SUM_DTYPE = torch.float32  # Neuron has no float64
GROUPS_CARRY_OBJECTS = False


def computes() -> bool:
    return True


def build_model(mesh: Any, params: Params, config: ModelConfig, shards: Path, kv_groups: list[list[int]]) -> DecoderLM:
    return build_static_model(mesh, params, config, shards, kv_groups, compiler=NEURON, device=DEVICE)


def save_adapter(folder: Path, model: DecoderLM) -> None:
    if dist.get_rank() < model.backend.tp_size:  # data-parallel replicas hold equal adapters
        adapter = {name: tensor.cpu() for name, tensor in adapter_state(model).items()}
        save_rank(rank_file(folder, LORA_TAG, model.backend.tp_rank), adapter)


def trainer_placement(params: Params) -> dict[str, Any]:
    return {"accelerator": NeuronAccelerator(), "strategy": NeuronStrategy(params)}


class NeuronAccelerator(Accelerator):
    """One logical NeuronCore per process."""

    def setup_device(self, device: torch.device) -> None:
        """Nothing: the process group takes this rank's core, and must be the first to use the device."""

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: int) -> int:
        return devices

    @staticmethod
    def get_parallel_devices(devices: int) -> list[torch.device]:
        return [DEVICE] * devices  # each process sees its own only

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NEURON


class NeuronStrategy(ModelParallelStrategy):
    """Lightning's strategy over a device mesh, with process groups of Neuron."""

    def __init__(self, params: Params):
        super().__init__(
            data_parallel_size=params.train.dp_size, tensor_parallel_size=params.convert.tp_size,
            process_group_backend=NEURON,
        )  # fmt: skip

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj  # Lightning asks for paths, which are the same on every rank
