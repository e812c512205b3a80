"""Training progress: a progress bar or log lines, DVCLive's curves and those of other loggers, tokens and seconds."""

import resource
import sys
import time
from typing import Any

import pytorch_lightning as pl
from dvclive import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from trnlora.training import cluster
from trnlora.training.loggers import Loggers

LINES = 20  # progress lines in a log, for any number of steps


class TrainingProgress(pl.Callback):
    """Counts tokens (without padding) and the seconds of training steps, and writes the curves.

    total_steps: optimizer steps of the whole run. curves: DVCLive's, on the first rank. (DVCLive's own Lightning logger
    counts steps from 0 and logs the first step twice.) loggers: get the same values. tokens: of all replicas. seconds:
    without validation and start-up. A resumed run starts both at the values of the checkpoint.
    """

    def __init__(
        self, total_steps: int, curves: Live | None, loggers: Loggers, *, tokens: int = 0, seconds: float = 0.0
    ):
        self.total_steps = total_steps
        self.curves = curves
        self.loggers = loggers
        self.tokens = tokens
        self.seconds = seconds
        self._bar: Progress | None = None

    def state(self) -> dict[str, Any]:
        """The values that a resumed run passes to `__init__`."""
        return {"tokens": self.tokens, "seconds": self.seconds}

    def on_sanity_check_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            print("scoring the base model on the validation rows", flush=True)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero and sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"),
                TimeElapsedColumn(), TimeRemainingColumn(),
            )  # fmt: skip
            self._task = self._bar.add_task("training", total=self.total_steps, state="")
            self._bar.start()

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.tokens += batch["tokens"]
        self.seconds += time.perf_counter() - self._started
        if (index + 1) % trainer.accumulate_grad_batches:
            return
        if not trainer.is_global_zero:
            return
        step = trainer.global_step
        self._keep(
            step,
            {
                "train/loss": module.train_loss,
                "train/grad_norm": module.grad_norm,
                "train/lr": module.lr,
                "train/tokens_per_second": self.tokens / self.seconds,
            },
        )
        state = f"loss {module.train_loss:.3f} · {self.tokens / self.seconds:.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, completed=step, state=state)
        elif step == self.total_steps or step % max(1, self.total_steps // LINES) == 0:
            left = self.seconds / step * (self.total_steps - step)
            print(f"step {step}/{self.total_steps} · {state} · {left:.0f} s left", flush=True)

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.is_global_zero:
            loss = module.base_validation_loss if trainer.sanity_checking else module.validation_loss
            print(f"validation loss {loss:.4f}", flush=True)
            self._keep(trainer.global_step, {"validation/loss": loss})

    def _keep(self, step: int, values: dict[str, float]) -> None:
        if self.curves:
            self.curves.step = step
            for name, value in values.items():
                self.curves.log_metric(name, value)
        self.loggers.log(values, step)

    def flush(self) -> None:
        """Write the curves to disk."""
        if self.curves:
            self.curves.make_summary()
        self.loggers.flush()

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._bar:
            self._bar.stop()

    @staticmethod
    def peak_rss_gib() -> list[float]:
        """Peak resident memory of every rank, GiB. Call on all ranks."""
        mine = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
        return cluster.gather("peak_rss_gib", mine)
