"""The LightningModule: a decoder with LoRA over any backend's parallel layers, its loss, clipping and validation."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_fabric.utilities.apply_func import move_data_to_device
from torch import Tensor
from torch.utils.data import DataLoader

from trnlora.model.decoder import DecoderLM
from trnlora.model.lora import draw_dropout, whole_weights
from trnlora.model.targets import AdapterTensor
from trnlora.model.tensors import Cut
from trnlora.params import Train
from trnlora.training.batches import MicroBatches, epoch_order, steps_per_epoch
from trnlora.training.schedule import learning_rate_factor

# Values measured so far, which a resumed run does not measure again.
MEASURED = ("base_validation_loss", "validation_loss", "train_loss", "grad_norm", "lr")


def gradient_squares(gradients: list[Tensor], copies: list[int], is_whole: list[bool]) -> tuple[Tensor, Tensor]:
    """Sums of squares: of this rank's parts of tensors, to be summed over the ranks, and of tensors whole on each.

    copies: the number of ranks that hold the same part.
    """
    cut, whole = gradients[0].new_zeros(2).unbind()
    for gradient, count, of_whole in zip(gradients, copies, is_whole, strict=True):
        squares = gradient.square().sum() / count
        cut, whole = (cut, whole + squares) if of_whole else (cut + squares, whole)
    return cut.clone(), whole


def scale_gradients(gradients: list[Tensor], scale: Tensor) -> None:
    for gradient in gradients:
        gradient.mul_(scale)


class NotFinite(Exception):
    """A loss or gradient became NaN or Inf.

    what: e.g. "the loss is nan"; step: from 1, or 0 for the base model; rows: the packed rows of the step's batch.
    """

    def __init__(self, what: str, step: int, rows: list[int]):
        super().__init__(f"{what} at step {step}")
        self.step = step
        self.rows = rows


@dataclasses.dataclass(frozen=True)
class BestValidation:
    """The validation with the lowest loss so far. That of the base model is not one of them."""

    loss: float = math.inf  # nats per token
    step: int = 0
    later: int = 0  # validations since then
    adapter: dict[str, Tensor] | None = None  # this rank's values at that step, on the CPU; only with train.keep: best


class LoraFinetuner(pl.LightningModule):
    """Trains the adapter of the model that `build` returns.

    build: returns this rank's model, given the strategy's device mesh with dims data_parallel and tensor_parallel.
    adapter: the adapter's tensors, as `trnlora.model.targets.adapter_tensors` returns them.
    train_rows, validation_rows: packed rows as `trnlora.training.batches.read_packed_rows` returns them.
    step, restore: number of optimizer steps done, and a function from the device mesh to this rank's `training_state`
        after them; 0 and None for a new run.
    load_init_adapter: sets the values of the model's adapter before the first step; None: those that `build` gave it.
    sum_dtype: dtype in which validation losses are summed.
    check_finite: whether to raise NotFinite for a loss or gradient that is not finite.
    """

    def __init__(
        self,
        build: Callable[[Any], DecoderLM],
        train: Train,
        adapter: Iterable[AdapterTensor],
        train_rows: dict[str, Tensor],
        validation_rows: dict[str, Tensor],
        total_steps: int,
        step: int = 0,
        restore: Callable[[Any], dict[str, Any]] | None = None,
        load_init_adapter: Callable[[DecoderLM], None] | None = None,
        sum_dtype: torch.dtype = torch.float64,
        check_finite: bool = True,
    ):
        super().__init__()
        self.build = build
        self.train_params = train
        self.adapter = {tensor.nxd_key: tensor for tensor in adapter}
        self.train_rows = train_rows
        self.validation_rows = validation_rows
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch(len(train_rows["labels"]), train.global_batch_size)
        self.start_step = step
        self.restore = restore
        self.load_init_adapter = load_init_adapter
        self.restored: dict[str, Any] | None = None
        self.sum_dtype = sum_dtype
        self.check_finite = check_finite
        self.model: DecoderLM | None = None
        self.base_validation_loss = math.nan  # measured before the first step, when lora_B is 0
        self.validation_loss = math.nan
        self.best = BestValidation()
        self.train_loss = math.nan  # of the last step, like the next two
        self.grad_norm = math.nan  # before clipping
        self.lr = math.nan

    def training_state(self) -> dict[str, Any]:
        """Everything that this rank needs to resume after an optimizer step, as CPU tensors."""
        optimizer, schedule = self.optimizers(use_pl_optimizer=False), self.lr_schedulers()
        state = {
            "adapter": {name: parameter.detach() for name, parameter in self._trainable().items()},
            "optimizer": optimizer.state_dict(),  # type: ignore[union-attr]
            "schedule": schedule.state_dict(),  # type: ignore[union-attr]
            "measured": {name: getattr(self, name) for name in MEASURED},
            "best": vars(self.best),
        }
        return move_data_to_device(state, "cpu")

    def configure_model(self) -> None:
        assert self.device_mesh is not None  # set by the strategy
        self.model = self.build(self.device_mesh)
        self.dp_group = self.device_mesh["data_parallel"].get_group()
        self.dp_rank = self.device_mesh["data_parallel"].get_local_rank()
        self.tp_group = self.device_mesh["tensor_parallel"].get_group()
        self._gradient_squares = self.model.backend.compile(gradient_squares)
        self._scale_gradients = self.model.backend.compile(scale_gradients)
        if self.restore:
            self.restored = self.restore(self.device_mesh)
            for name, value in self.restored["measured"].items():
                setattr(self, name, value)
            self.best = BestValidation(**self.restored["best"])
            self._set_adapter(self.restored["adapter"])

    @torch.no_grad()
    def _set_adapter(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._trainable().items():
            parameter.copy_(values[name])

    def _loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        assert self.model is not None
        return self.model.loss(batch["input_ids"], batch["position_ids"], batch["document_ids"], batch["labels"])

    def _batches(self, rows: dict[str, Tensor], order: Tensor, first: int = 0) -> DataLoader:
        assert self.model is not None
        batches = MicroBatches(
            rows,
            order,
            global_batch_size=self.train_params.global_batch_size,
            micro_batch_size=self.train_params.micro_batch_size,
            dp_rank=self.dp_rank,
            dp_size=self.train_params.dp_size,
            static_shapes=self.model.backend.static_shapes,
            dtype=self.model.backend.id_dtype,
        )
        return DataLoader(batches, batch_size=None, sampler=range(first, len(batches)))

    def train_dataloader(self) -> DataLoader:
        """The micro-batches of the epoch, or the remaining ones in the epoch where a run resumes."""
        order = epoch_order(len(self.train_rows["labels"]), self.current_epoch, self.train_params.seed)
        epoch, steps_done = divmod(self.start_step, self.steps_per_epoch)
        first = steps_done * self.trainer.accumulate_grad_batches if self.current_epoch == epoch else 0
        return self._batches(self.train_rows, order, first)

    def val_dataloader(self) -> DataLoader:
        return self._batches(self.validation_rows, torch.arange(len(self.validation_rows["labels"])))

    @property
    def out_of_patience(self) -> bool:
        """Whether train.early_stopping_patience ends the training."""
        patience = self.train_params.early_stopping_patience
        return patience is not None and self.best.later >= patience

    def on_fit_start(self) -> None:
        if self.out_of_patience:  # the run was interrupted after that decision
            self.trainer.should_stop = True

    def on_train_start(self) -> None:
        """After the validation of the base model, which is computed with a new adapter: its lora_B is 0."""
        if self.load_init_adapter and self.start_step == 0:
            assert self.model is not None
            self.load_init_adapter(self.model)

    def on_train_epoch_start(self) -> None:
        self.step_loss = torch.zeros((), device=self.device)

    def on_train_batch_start(self, batch: dict[str, Tensor], index: int) -> None:
        """Draw dropout's random numbers, seeded by the step and the micro-batch's place in the global batch.

        So no generator state is needed to resume, tensor-parallel ranks draw the same masks, and a row's mask does not
        depend on the number of replicas.
        """
        micro_batch = index % self.trainer.accumulate_grad_batches * self.train_params.dp_size
        micro_batch += self.dp_rank
        seed = f"{self.train_params.seed} {self.global_step} {micro_batch}"
        assert self.model is not None
        draw_dropout(self.model, int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4]), batch["labels"])

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss_sum, _ = self._loss(batch)
        loss = loss_sum * batch["loss_scale"]
        self.step_loss += loss.detach() / self.trainer.accumulate_grad_batches
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Sum the ranks' and the replicas' gradients. Each is divided by the number of tokens in the global batch."""
        assert self.model is not None
        self.model.backend.mark_step()  # so that a step's last micro-batch has the graph of those before
        whole = [weight.grad for weight in whole_weights(self.model)]
        self.model.backend.add_over_ranks([gradient for gradient in whole if gradient is not None])
        if dist.get_world_size(self.dp_group) > 1:
            gradients = [parameter.grad for parameter in self._trainable().values() if parameter.grad is not None]
            self.model.backend.add_over_replicas(gradients, self.dp_group)
            dist.all_reduce(self.step_loss, group=self.dp_group)
        self.lr = optimizer.param_groups[0]["lr"]

    def configure_gradient_clipping(self, optimizer: Any, *unused: Any, **unused_too: Any) -> None:
        """Clip by the gradient norm over all ranks. Values that several ranks hold count once."""
        assert self.model is not None
        trainable = self._trainable()
        gradients = [parameter.grad for parameter in trainable.values()]
        tensors = [self.adapter[name.removeprefix("model.")] for name in trainable]
        copies = [tensor.copies(self.model.kv_size_multiplier) for tensor in tensors]
        cut, whole = self._gradient_squares(gradients, copies, [tensor.cut is Cut.WHOLE for tensor in tensors])
        dist.all_reduce(cut, group=self.tp_group)
        norm = (cut + whole).sqrt()
        self._scale_gradients(gradients, (self.train_params.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        self.model.backend.mark_step()
        self.train_loss, self.grad_norm = self.step_loss.item(), norm.item()
        self.step_loss.zero_()
        self._check_finite("loss", self.train_loss)
        self._check_finite("gradient's norm", self.grad_norm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Forward, backward and the hooks above are the closure that the optimizer calls."""
        super().optimizer_step(*args, **kwargs)
        assert self.model is not None
        self.model.backend.mark_step()  # what follows a step, of which there are several kinds, is no part of its graph

    def _check_finite(self, what: str, value: float) -> None:
        """Raise NotFinite if `value` is not finite. All ranks raise it, since it covers the global batch."""
        if self.check_finite and not math.isfinite(value):
            epoch, done = divmod(self.global_step, self.steps_per_epoch)
            order = epoch_order(len(self.train_rows["labels"]), epoch, self.train_params.seed)
            size = self.train_params.global_batch_size
            rows = order[done * size : (done + 1) * size].tolist()
            raise NotFinite(f"the {what} is {value}", self.global_step + 1, rows)

    def is_validated(self, step: int) -> bool:
        """Whether there is a validation after this number of optimizer steps."""
        every = self.train_params.validate_every_steps
        return not step % self.steps_per_epoch or step == self.total_steps or (every is not None and not step % every)

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        """Let Lightning validate after this batch, or else after the epoch's last one.

        A fixed val_check_interval would count the batches of an epoch from where a resumed run begins.
        """
        step_is_done = (index + 1) % self.trainer.accumulate_grad_batches == 0
        validate = step_is_done and self.is_validated(self.global_step)
        self.trainer.val_check_batch = 1 if validate else self.trainer.num_training_batches

    def on_validation_epoch_start(self) -> None:
        self.validation_sums = torch.zeros(2, dtype=self.sum_dtype, device=self.device)  # nats, labelled tokens

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        loss_sum, tokens = self._loss(batch)
        self.validation_sums += torch.stack([loss_sum, tokens]).to(self.validation_sums.dtype)

    def on_validation_epoch_end(self) -> None:
        assert self.model is not None
        self.model.backend.mark_step()  # the last batch, in the graph of the others
        dist.all_reduce(self.validation_sums, group=self.dp_group)
        # The ranks of a replica have computed the same sums. If one had not, it alone would stop, and the others wait.
        dist.all_reduce(self.validation_sums, op=dist.ReduceOp.MAX, group=self.tp_group)
        mean = self.validation_sums[0] / self.validation_sums[1]
        self.model.backend.mark_step()
        loss = mean.item()
        if self.check_finite and not math.isfinite(loss):
            raise NotFinite(f"the validation loss is {loss}", self.global_step, [])
        if self.trainer.sanity_checking:
            self.base_validation_loss = loss
            return
        self.validation_loss = loss
        if loss < self.best.loss:
            self.best = BestValidation(loss, self.global_step, adapter=self._adapter_to_keep())
        else:
            self.best = dataclasses.replace(self.best, later=self.best.later + 1)
        if self.out_of_patience:
            self.trainer.should_stop = True

    def _adapter_to_keep(self) -> dict[str, Tensor] | None:
        """A copy of this rank's adapter on the CPU; None with train.keep: last."""
        if self.train_params.keep == "last":
            return None
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in self._trainable().items()}

    def choose_adapter(self) -> int:
        """After the fit, set the adapter and the validation loss to those that train.keep names. Returns their step."""
        if self.train_params.keep == "last":
            return self.global_step
        assert self.best.adapter is not None  # the last step was validated, at least
        self._set_adapter(self.best.adapter)
        self.validation_loss = self.best.loss
        return self.best.step

    def configure_optimizers(self) -> Any:
        train = self.train_params
        assert self.model is not None
        parameters = list(self._trainable().values())
        optimizer = self.model.backend.adamw(parameters, lr=train.lr, weight_decay=train.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(train, step, self.total_steps)
        )
        if self.restored:
            optimizer.load_state_dict(self.restored["optimizer"])
            schedule.load_state_dict(self.restored["schedule"])
            self.restored = None  # free the memory: the optimizer holds it now
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _trainable(self) -> dict[str, torch.nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
