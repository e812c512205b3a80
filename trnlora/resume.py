"""Checkpoints within a training run: a run that was stopped, however hard, goes on where it was.

    .scratch/checkpoints/<key>/step_00000040/rank_00.pt …     one file a rank
                                             curves/          DVCLive's files up to that step
                                             SHA256SUMS

The key is a hash of all that the result depends on, so a checkpoint of another configuration is never found. The
folder is no out of DVC, which deletes a stage's outs before it runs. What is random is a function of seed, step and
replica (`LoraFinetuner.on_train_batch_start`), and the order of rows one of seed and epoch: neither needs storing.
"""

import contextlib
import hashlib
import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from trnlora.errors import UserError
from trnlora.files import atomic_dir, atomic_file, check_sums, partial_path, sha256, write_sums
from trnlora.progress import TrainingProgress

CHECKPOINTS = Path(".scratch/checkpoints")
CURVES = "curves"


def run_folder(defined_by: dict[str, Any]) -> Path:
    """The folder of the run that `defined_by` (of JSON's types), this library's code and the arithmetic define.

    The code is that of the modules imported so far. Threads and instruction set count, since sums depend on them in
    the last bits and a resumed run is to end in the same bytes.
    """
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "trnlora"]
    files = [Path(sys.argv[0]), *(Path(module.__file__) for module in modules if module.__file__)]
    defined_by = defined_by | {
        "code": {f"{file.parent.name}/{file.name}": sha256(file) for file in files},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
    text = json.dumps(defined_by, sort_keys=True)
    return CHECKPOINTS / hashlib.sha256(text.encode()).hexdigest()[:16]


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a run's folder that is whole. Every rank finds the same: none writes before all have."""
    for saved in reversed(_saved(folder)):
        try:
            check_sums(saved, "finetune_lora")
            return saved
        except UserError as error:
            print(f"checkpoint passed over: {str(error).partition(': run ')[0]}", flush=True)
    return None


def load(saved: Path, rank: int) -> dict[str, Any]:
    """What `rank` gave to `Checkpoints.save`: step, module and progress."""
    state: dict[str, Any] = torch.load(saved / f"rank_{rank:02d}.pt", weights_only=True, map_location="cpu")
    return state


def restore_curves(saved: Path, target: Path) -> None:
    """Put DVCLive's files back as they were at the checkpoint."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(saved / CURVES, target)


def fast_forward(trainer: pl.Trainer, step: int, steps_per_epoch: int) -> None:
    """Tell Lightning's loops, before the fit, that `step` optimizer steps are done.

    To Lightning, an epoch that was begun is a shorter one: the module's data loader starts where the run stands.
    """
    epochs: Any = trainer.fit_loop.epoch_progress.current
    epochs.processed = epochs.completed = step // steps_per_epoch
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step


class Checkpoints(pl.Callback):
    """Writes a checkpoint every `every` optimizer steps and after each epoch, and keeps the last `kept` of them.

    It stands after `progress` among the trainer's callbacks, so that a step is counted before it is saved.
    """

    def __init__(self, folder: Path, progress: TrainingProgress, every: int, kept: int):
        self.folder = folder
        self.progress = progress
        self.every = every
        self.kept = kept

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        _let_sigterm_end_the_process()

    def on_validation_start(self, trainer: pl.Trainer, module: Any) -> None:
        _let_sigterm_end_the_process()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if (index + 1) % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step
        if step % self.every == 0 and step % module.steps_per_epoch:  # an epoch's last step waits for the validation
            self.save(step, module)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.save(trainer.global_step, module)

    def save(self, step: int, module: Any) -> None:
        """Every rank writes its file below the folder that the first rank renames when all have."""
        rank = dist.get_rank()
        target = self.folder / f"step_{step:08d}"
        with atomic_dir(target) if rank == 0 else contextlib.nullcontext():
            dist.barrier()
            state = {"step": step, "module": module.training_state(), "progress": self.progress.state()}
            with atomic_file(partial_path(target) / f"rank_{rank:02d}.pt") as partial:
                torch.save(state, partial)
            dist.barrier()
            if self.progress.curves:
                self.progress.curves.make_summary()
                shutil.copytree(self.progress.curves.dir, partial_path(target) / CURVES)
                write_sums(partial_path(target))
        if rank == 0:
            for old in _saved(self.folder)[: -self.kept]:
                shutil.rmtree(old)


def _saved(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*"))


def _let_sigterm_end_the_process() -> None:
    """Undo Lightning's handler: it waits for the other ranks, which may be dead, and nothing needs saving."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
