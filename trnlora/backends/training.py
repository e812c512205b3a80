"""Which backend trains: the functions that a backend's training module offers, and the module for params.backend.

`backend` in params.yaml | layers                          | training module
cpu, cuda                | `trnlora.backends.torch`        | `trnlora.backends.torch_training`
neuron                   | `trnlora.backends.torch_static` | `trnlora.backends.neuron_training`
nxd                      | `trnlora.backends.nxd`          | `trnlora.backends.nxd_training`

The training code asks nowhere else which backend runs.
"""

from pathlib import Path
from typing import Any, Protocol, cast

import torch

from trnlora.model.config import ModelConfig
from trnlora.model.decoder import DecoderLM
from trnlora.params import Params


class TrainingBackend(Protocol):
    """What a training module offers. Call each function on all ranks."""

    SUM_DTYPE: torch.dtype  # in which losses are added up: the widest float of the device
    GROUPS_CARRY_OBJECTS: bool  # whether its process groups can broadcast Python objects

    def trainer_placement(self, params: Params) -> dict[str, Any]:
        """The arguments of Lightning's Trainer that say where and how to run."""
        ...

    def build_model(
        self, mesh: Any, params: Params, config: ModelConfig, shards: Path, kv_groups: list[list[int]]
    ) -> DecoderLM:
        """This rank's model on its device, its base weights frozen, with LoRA on lora.target_modules.

        mesh: the strategy's, with the dims data_parallel and tensor_parallel; shards: of convert_nxd; kv_groups: ranks
        that hold the same KV heads, as `trnlora.weights.nxd_layout.kv_replica_groups` returns them.
        Raises UserError when the rank's shard is missing or does not fit the model.
        """
        ...

    def save_adapter(self, folder: Path, model: DecoderLM) -> None:
        """Write this rank's part of the adapter below `folder` under NxD's paths."""
        ...

    def computes(self) -> bool:
        """False in a trial run that only extracts graphs, whose numbers mean nothing."""
        ...


def training_backend(name: str) -> TrainingBackend:
    """The training module for params.backend; imported here, because each needs libraries that others do not have."""
    if name == "nxd":
        from trnlora.backends import nxd_training

        return cast(TrainingBackend, nxd_training)
    if name == "neuron":
        from trnlora.backends import neuron_training

        return cast(TrainingBackend, neuron_training)
    from trnlora.backends import torch_training

    return cast(TrainingBackend, torch_training)
