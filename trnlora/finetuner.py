"""The training loop's Lightning module: one Llama with LoRA over any backend's parallel layers."""

import math
import os
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from trnlora.batches import MicroBatches, epoch_order
from trnlora.errors import UserError
from trnlora.llama import Llama
from trnlora.lora import is_replicated
from trnlora.params import Train


def linear_schedule(step: int, total_steps: int, warmup_steps: int) -> float:
    """Factor on the peak learning rate at a step counted from 0: linear up, then linear down to 0 after the last."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return (total_steps - step) / max(1, total_steps - warmup_steps)


class LoraFinetuner(pl.LightningModule):
    """Trains the adapter of the model that `build` returns.

    build: makes this rank's model, from the strategy's device mesh with the dims data_parallel, tensor_parallel.
    train_rows, validation_rows: packed rows as `trnlora.batches.read_rows` gives them.
    """

    def __init__(
        self,
        build: Callable[[Any], Llama],
        train: Train,
        train_rows: dict[str, Tensor],
        validation_rows: dict[str, Tensor],
        total_steps: int,
    ):
        super().__init__()
        self.build = build
        self.train_params = train
        self.train_rows = train_rows
        self.validation_rows = validation_rows
        self.total_steps = total_steps
        self.warmup_steps = math.ceil(train.warmup_ratio * total_steps)
        self.model: Llama | None = None
        self.base_validation_loss = math.nan  # before the first step: lora_B is 0, so this is the base model
        self.validation_loss = math.nan
        self.validated_step = -1
        self.train_loss = math.nan  # of the last step, like the next two
        self.grad_norm = math.nan  # before clipping
        self.lr = math.nan

    def configure_model(self) -> None:
        if self.model is None:  # Lightning calls this again for a validation after the fit
            assert self.device_mesh is not None  # the strategy's
            self.model = self.build(self.device_mesh)
            self.dp_group = self.device_mesh["data_parallel"].get_group()
            self.tp_group = self.device_mesh["tensor_parallel"].get_group()

    def _loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        assert self.model is not None
        hidden = self.model(batch["input_ids"], batch["position_ids"], batch["document_ids"])
        return self.model.loss(hidden, batch["labels"])

    def _batches(self, rows: dict[str, Tensor], order: Tensor) -> DataLoader:
        batches = MicroBatches(
            rows,
            order,
            global_batch_size=self.train_params.global_batch_size,
            micro_batch_size=self.train_params.micro_batch_size,
            dp_rank=dist.get_rank(self.dp_group),
            dp_size=self.train_params.dp_size,
        )
        return DataLoader(batches, batch_size=None)

    def train_dataloader(self) -> DataLoader:
        order = epoch_order(len(self.train_rows["labels"]), self.current_epoch, self.train_params.seed)
        return self._batches(self.train_rows, order)

    def val_dataloader(self) -> DataLoader:
        return self._batches(self.validation_rows, torch.arange(len(self.validation_rows["labels"])))

    def on_train_epoch_start(self) -> None:
        self.step_loss = torch.zeros((), device=self.device)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss_sum, _ = self._loss(batch)
        loss = loss_sum * batch["loss_scale"]
        self.step_loss += loss.detach() / self.trainer.accumulate_grad_batches
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the replicas' gradients (each was already divided by the whole global batch's tokens)."""
        if dist.get_world_size(self.dp_group) > 1:
            assert self.model is not None
            gradients = [parameter.grad for parameter in self._trainable().values() if parameter.grad is not None]
            self.model.backend.add_over_replicas(gradients, self.dp_group)
            dist.all_reduce(self.step_loss, group=self.dp_group)
        self.train_loss = self.step_loss.item()
        self.step_loss.zero_()
        self.lr = optimizer.param_groups[0]["lr"]

    def configure_gradient_clipping(self, optimizer: Any, *unused: Any, **unused_too: Any) -> None:
        """Clip by the norm over all ranks: what is whole on every rank, or copied to several, counts once."""
        squares = torch.zeros(2, device=self.device)  # of cut parameters (to be added over ranks), of replicated ones
        for name, parameter in self._trainable().items():
            assert parameter.grad is not None
            copies = self._copies(name)
            squares[int(is_replicated(name))] += parameter.grad.square().sum() / copies
        dist.all_reduce(cut := squares[:1].clone(), group=self.tp_group)
        norm = (cut[0] + squares[1]).sqrt()
        # neuron_parallel_compile traces the run without computing it, so that its numbers mean nothing.
        if not torch.isfinite(norm) and "NEURON_EXTRACT_GRAPHS_ONLY" not in os.environ:
            raise UserError(
                f"the gradient is {norm.item()} at step {self.global_step}: lower train.lr, or look for broken rows"
            )
        scale = (self.train_params.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        for parameter in self._trainable().values():
            parameter.grad.mul_(scale)  # type: ignore[union-attr]
        self.grad_norm = norm.item()

    def on_validation_epoch_start(self) -> None:
        # Nats and labelled tokens; Neuron has no float64.
        dtype = torch.float32 if self.device.type == "xla" else torch.float64
        self.validation_sums = torch.zeros(2, dtype=dtype, device=self.device)

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        loss_sum, tokens = self._loss(batch)
        self.validation_sums += torch.stack([loss_sum, tokens]).to(self.validation_sums.dtype)

    def on_validation_epoch_end(self) -> None:
        dist.all_reduce(self.validation_sums, group=self.dp_group)
        loss = (self.validation_sums[0] / self.validation_sums[1]).item()
        if self.trainer.sanity_checking:
            self.base_validation_loss = loss
            return
        self.validation_loss = loss
        self.validated_step = self.global_step

    def configure_optimizers(self) -> Any:
        train = self.train_params
        assert self.model is not None
        parameters = list(self._trainable().values())
        optimizer = self.model.backend.adamw(parameters, lr=train.lr, weight_decay=train.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: linear_schedule(step, self.total_steps, self.warmup_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _trainable(self) -> dict[str, torch.nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def _copies(self, name: str) -> int:
        assert self.model is not None
        return self.model.kv_size_multiplier if name.endswith((".weight_k", ".weight_v")) else 1
