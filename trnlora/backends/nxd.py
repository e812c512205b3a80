"""NxD's layers, LoRA, process groups, checkpoints and optimizer on torch_xla: what trains on Trainium.

Written against neuronx_distributed 0.18 (Neuron SDK 2.29); 0.19 of SDK 2.30 and 2.31 has the same training code. The
model, data, schedule, clipping and adapter format are those of every backend. tests/neuron runs this file against
NxD's own Python code on a CPU; no part of it was run on a device.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import neuronx_distributed as nxd
import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch_xla.core.xla_model as xm
from neuronx_distributed.modules.lora import LoraConfig, LoraModel
from neuronx_distributed.modules.lora.tp_layer import LoraGQAQKVParallelLinear
from neuronx_distributed.modules.qkv_linear import GQAQKVColumnParallelLinear
from neuronx_distributed.parallel_layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear
from neuronx_distributed.parallel_layers import parallel_state as state
from neuronx_distributed.parallel_layers.loss_functions import parallel_cross_entropy
from neuronx_distributed.utils import cpu_mode
from pytorch_lightning.accelerators import Accelerator
from pytorch_lightning.plugins import Precision
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch_xla.distributed.parallel_loader import MpDeviceLoader
from torch_xla.utils.checkpoint import checkpoint

from trnlora.model.config import LlamaConfig
from trnlora.weights.storage import LORA_TAG, PRETRAINED_TAG, open_rank_file, rank_file
from trnlora.errors import UserError
from trnlora.model.decoder import Llama
from trnlora.params import Params

SEQUENCE = 1  # the dimension of (B, T, H) that sequence parallelism cuts


class _Embedding(ParallelEmbedding):
    def forward(self, ids: Tensor) -> Tensor:
        x = super().forward(ids)
        return x.transpose(0, 1) if self.sequence_parallel_enabled else x  # NxD returns (T/tp, B, H) there


class _QKVLinear(GQAQKVColumnParallelLinear):
    def __init__(self, input_size: int, output_sizes: Sequence[int], kv_size_multiplier: int, sequence_parallel: bool):
        super().__init__(
            input_size, list(output_sizes), bias=False, gather_output=False, kv_size_multiplier=kv_size_multiplier,
            fuse_qkv=False, sequence_parallel_enabled=sequence_parallel,
            init_method=nn.init.zeros_,  # a lora_B's; base weights come from the shards
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.sequence_parallel_enabled:
            return super().forward(x)
        q, k, v = super().forward(x.transpose(0, 1))  # NxD gathers along dim 0 here, whatever its other layers do
        return q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)


class _LoraQKVLinear(LoraGQAQKVParallelLinear):
    """NxD's LoRA layer, with what sequence parallelism needs."""

    def update_layer(self, lora_config: LoraConfig, *unused: Any) -> None:
        super().update_layer(lora_config)
        base = self.get_base_layer()
        self.lora_B = _QKVLinear(
            self.lora_rank, base.output_sizes, base.kv_size_multiplier, base.sequence_parallel_enabled
        )
        # With sequence parallelism each rank sees its own tokens' part of A's gradient. NxDOptimizer adds up the
        # gradients of parameters with this mark; NxD's LoRA does not set it and so trains another A on every rank.
        self.lora_A.weight.sequence_parallel_enabled = base.sequence_parallel_enabled


class _LoraModel(LoraModel):
    """Puts `_LoraQKVLinear` into a model in place; its state_dict is the adapter under NxD's keys."""

    def _create_new_module(self, target: nn.Module, current_key: str) -> nn.Module:
        return _LoraQKVLinear(target, self.lora_config)


class NeuronBackend:
    """`trnlora.model.parallel.Backend` over NxD's groups, which `NeuronStrategy` makes."""

    static_shapes = True
    adapter: LoraModel  # NxD's wrapper around the model with LoRA, which saves the adapter

    def __init__(self, params: Params, nxd_config: dict[str, Any]):
        self.params = params
        self.nxd_config = nxd_config
        self.sequence_parallel = params.neuron.sequence_parallel
        self.tp_rank = state.get_tensor_model_parallel_rank()
        self.tp_size = state.get_tensor_model_parallel_size()

    def parallel_embedding(self, num_embeddings: int, embedding_dim: int) -> nn.Module:
        return _Embedding(num_embeddings, embedding_dim, sequence_parallel_enabled=self.sequence_parallel)

    def column_parallel_linear(self, input_size: int, output_size: int) -> nn.Module:
        return ColumnParallelLinear(
            input_size, output_size, bias=False, gather_output=False,
            sequence_parallel_enabled=self.sequence_parallel, sequence_dimension=SEQUENCE,
        )  # fmt: skip

    def row_parallel_linear(self, input_size: int, output_size: int) -> nn.Module:
        return RowParallelLinear(
            input_size, output_size, bias=False, input_is_parallel=True,
            sequence_parallel_enabled=self.sequence_parallel, sequence_dimension=SEQUENCE,
        )  # fmt: skip

    def gqa_qkv_linear(self, input_size: int, output_sizes: Sequence[int], kv_size_multiplier: int) -> nn.Module:
        return _QKVLinear(input_size, output_sizes, kv_size_multiplier, self.sequence_parallel)

    def documents(self, document_ids: Tensor) -> Tensor:
        """Who may look at whom (B, 1, T, T): earlier tokens of the same document. Padding sees padding."""
        tokens = document_ids.shape[1]
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=document_ids.device).tril()
        return (document_ids[:, None, :, None] == document_ids[:, None, None, :]) & causal

    def attention(self, q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
        # NxD's flash attention kernel knows causal masks alone, so it cannot keep packed documents apart.
        if self.params.neuron.selective_checkpointing and torch.is_grad_enabled():
            return checkpoint(_core_attention, q, k, v, documents, use_reentrant=True)  # all that torch_xla supports
        return _core_attention(q, k, v, documents)

    def cross_entropy(self, hidden: Tensor, lm_head: nn.Module, targets: Tensor) -> Tensor:
        # At every position, with zeros where nothing counts: a shape that changes would be another graph to compile.
        logits = lm_head(hidden).flatten(0, 1).float()  # (B·T, V/tp)
        targets = targets.flatten()
        return (parallel_cross_entropy(logits, targets.clamp(min=0)) * (targets != -100)).sum()

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)
        xm.set_rng_state(seed)

    def add_over_replicas(self, gradients: Sequence[Tensor], group: dist.ProcessGroup) -> None:
        """NxDOptimizer has replaced the gradients with their mean by now: make it the sum."""
        for gradient in gradients:
            gradient.mul_(dist.get_world_size(group))

    def adamw(self, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """NxD's wrapper around AdamW, which also reduces gradients; see `NeuronPrecision`."""
        return nxd.initialize_parallel_optimizer(
            self.nxd_config, torch.optim.AdamW, parameters, lr=lr, weight_decay=weight_decay
        )


def _core_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Plain products, as NxD's Llama has them (its CoreAttention), with a mask for packed documents."""
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5  # (B, heads, T, T)
    scores = scores.float().masked_fill(~mask, -10000.0)
    return torch.matmul(torch.softmax(scores, dim=-1).to(q.dtype), v)


def build_model(
    mesh: "NeuronMesh", params: Params, config: LlamaConfig, shards: Path, kv_groups: list[list[int]]
) -> Llama:
    """This rank's model on its device: base weights frozen, NxD's LoRA on qkv_proj.

    mesh: the strategy's; kv_groups: ranks that hold the same KV heads, as `trnlora.weights.nxd_layout.kv_replica_groups` has them.
    Raises UserError when the rank's shard is missing or does not fit, or when NxD groups other ranks.
    """
    _check_kv_groups(kv_groups)
    backend = NeuronBackend(params, mesh.nxd_config)
    model = Llama.empty(config, backend, params.convert.kv_size_multiplier)
    with open_rank_file(rank_file(shards, PRETRAINED_TAG, backend.tp_rank)) as stored:
        model.check_shard({name: tensor.shape for name, tensor in stored.items()})
    model.to(getattr(torch, params.model.dtype)).to_empty(device=xm.xla_device())
    nxd.load_checkpoint(str(shards), tag=PRETRAINED_TAG, model=model, strict=True)
    lora = params.lora
    backend.adapter = _LoraModel(
        model,
        LoraConfig(
            lora_rank=lora.r,
            lora_alpha=lora.lora_alpha,
            lora_dropout=lora.lora_dropout,
            target_modules=list(lora.target_modules),
            # NxD's default True keeps the first 1/kv_size_multiplier of every lora_B's rows, weight_q's too.
            merge_sharded_lora=False,
        ),
    )
    backend.adapter.is_config_saved = True  # the stage writes it, beside the shards
    return model


def _check_kv_groups(kv_groups: list[list[int]]) -> None:
    """NxD adds up the gradients of k and v over groups of world ranks that it makes without a look at its own
    tensor-parallel groups. The two must fit, or gradients of different heads are added up."""
    ranks = next(group for group in state.get_tensor_model_parallel_replica_groups() if dist.get_rank() in group)
    expected = {tuple(ranks[rank] for rank in group) for group in kv_groups}
    found = {tuple(group) for group in state.get_kv_shared_replica_groups() if group[0] in ranks}
    if found != expected:
        raise UserError(
            f"NxD adds KV gradients over the ranks {sorted(found)}, equal heads are on {sorted(expected)}: "
            "run on the hardware that convert.hw_backend names, or choose another convert.tp_size"
        )


def save_adapter(folder: Path, model: Llama) -> None:
    """Write every rank's part of the adapter below `folder` under NxD's paths. Call on all ranks."""
    backend: Any = model.backend
    nxd.save_checkpoint(str(folder), tag=LORA_TAG, model=backend.adapter)


def _nxd_config(params: Params) -> dict[str, Any]:
    """NxD's own configuration. Once the processes know each other, this call makes NxD's groups too."""
    return nxd.neuronx_distributed_config(
        tensor_parallel_size=params.convert.tp_size,
        # ZeRO-1 is off: an adapter's optimizer state is a few megabytes a rank. Clipping is the trainer's: NxD's norm
        # counts a KV head once for each of its kv_size_multiplier copies, so that it would depend on the cut.
        optimizer_config={"zero_one_enabled": False, "grad_clipping": False},
        sequence_parallel=params.neuron.sequence_parallel,
        # The adapter is float32 whatever the model's dtype: it is its own master weight.
        mixed_precision_config={"use_master_weights": False, "use_fp32_grad_acc": False},
        # Which cores are neighbours depends on it: with 2, tp 32 on 64 cores, the replicas are ranks 0…15, 48…63 and
        # 16…47. NxD's default, 1, gives 0…31 and 32…63, which it says cannot talk to each other (parallel_state.py).
        lnc_size=params.neuron.logical_core_size,
    )


class NeuronMesh:
    """The little of torch's DeviceMesh that the trainer uses, over NxD's groups."""

    def __init__(self, nxd_config: dict[str, Any], get_group: Callable[[], dist.ProcessGroup] | None = None):
        self.nxd_config = nxd_config
        self.get_group = get_group

    def __getitem__(self, dim: str) -> "NeuronMesh":
        groups = {
            "data_parallel": state.get_data_parallel_group,
            "tensor_parallel": state.get_tensor_model_parallel_group,
        }
        return NeuronMesh(self.nxd_config, groups[dim])


# Lightning ----------------------------------------------------------------------------------------------------------
# NxD's own strategy wants the package `lightning` beside ours and manual optimization: its precision plugin drops the
# closure in which Lightning computes the gradients. What it does with NxD is here.


def trainer_placement(params: Params) -> dict[str, Any]:
    """The arguments of Lightning's Trainer that say where and how to run."""
    return {"accelerator": NeuronAccelerator(), "strategy": NeuronStrategy(params), "plugins": [NeuronPrecision()]}


class NeuronAccelerator(Accelerator):
    """One NeuronCore a process."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: int) -> int:
        return devices

    @staticmethod
    def get_parallel_devices(devices: int) -> list[torch.device]:
        return [xm.xla_device()] * devices

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "neuron"


class NeuronPrecision(Precision):
    """Runs a step in the order that NxD's optimizer wants."""

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: pl.LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        loss = closure()  # forward and backward; NxDOptimizer would reduce the gradients before it called this
        # NxDOptimizer.step adds gradients up over the replicas and steps in one call. What Lightning does between the
        # two (the module's hook before a step, clipping) goes there.
        hook = optimizer.optimizer.register_step_pre_hook(lambda *_: self._after_closure(model, optimizer))
        optimizer.step()
        hook.remove()
        xm.mark_step()
        return loss


class NeuronStrategy(ModelParallelStrategy):
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
        self._device_mesh = NeuronMesh(_nxd_config(self.params))  # type: ignore[assignment]
        state.initialize_kv_group(self.params.convert.kv_size_multiplier)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    def process_dataloader(self, dataloader: Any) -> MpDeviceLoader:
        """Feeds the device ahead of time, and ends a graph after each micro-batch."""
        loader = MpDeviceLoader(dataloader, self.root_device)
        loader.dataset, loader.batch_sampler = dataloader.dataset, None  # Lightning looks at them
        return loader

    def barrier(self, name: str | None = None) -> None:
        xm.rendezvous(name or "barrier")

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj  # Lightning asks for paths, which are the same on every rank
