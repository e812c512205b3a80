"""Checkpoints within a training run: a run that was stopped, however hard, goes on where it was.

    .scratch/checkpoints/<key>/step_00000040/tp_rank_00.pt …  one file a rank of the first replica
                                             run.json         step, progress, where it ran
                                             curves/          DVCLive's files up to that step
                                             SHA256SUMS

The key is a hash of all that the result depends on, so a checkpoint of another configuration is never found. The
folder is no out of DVC, which deletes a stage's outs before it runs. What is random is a function of seed, step and
micro-batch (`LoraFinetuner.on_train_batch_start`), and the order of rows one of seed and epoch: neither needs storing.
Replicas are equal, so a checkpoint is of any number of them, on any number of nodes.
"""

import contextlib
import dataclasses
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

from trnlora.training import cluster as nodes
from trnlora.errors import UserError
from trnlora.files import atomic_dir, atomic_file, check_sums, partial_path, read_json, sha256, write_json, write_sums
from trnlora.training.progress import TrainingProgress

CHECKPOINTS = Path(".scratch/checkpoints")
CURVES = "curves"
RUN = "run.json"


def run_folder(defined_by: dict[str, Any]) -> Path:
    """The folder of the run that `defined_by` (of JSON's types), this library's code and the arithmetic define.

    The code is that of the modules imported so far. The instruction set counts, since sums depend on it in the last
    bits and a resumed run is to end in the same bytes. On threads and replicas they depend too: `Begun` has those.
    """
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "trnlora"]
    files = [Path(sys.argv[0]), *(Path(module.__file__) for module in modules if module.__file__)]
    defined_by = defined_by | {
        "code": {f"{file.parent.name}/{file.name}": sha256(file) for file in files},
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
    text = json.dumps(defined_by, sort_keys=True)
    return CHECKPOINTS / hashlib.sha256(text.encode()).hexdigest()[:16]


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a run's folder that is whole."""
    for saved in reversed(_saved(folder)):
        try:
            check_sums(saved, "finetune_lora")
            return saved
        except UserError as error:
            print(f"checkpoint passed over: {str(error).partition(': run ')[0]}", flush=True)
    return None


@dataclasses.dataclass(frozen=True)
class Begun:
    """A run that goes on, of JSON's types; the checkpoint's RUN has all but its folder."""

    folder: str  # of the checkpoint
    step: int  # optimizer steps done
    progress: dict[str, Any]  # `TrainingProgress.state`
    # The result does not depend on these, but its last bits do.
    replicas: int
    threads: int  # of a rank

    @staticmethod
    def read(folder: Path) -> "Begun":
        return Begun(str(folder), **read_json(folder / RUN))

    def load(self, mesh: Any) -> dict[str, Any]:
        """The module's `training_state` of this rank. Call on all ranks: mesh as `LoraFinetuner` has it.

        The first replica reads it and tells the others, whose nodes need not see its folder. (Neuron's groups carry no
        objects: there they must.)
        """
        replicas: dist.ProcessGroup = mesh["data_parallel"].get_group()
        file = Path(self.folder) / _rank_file(mesh)
        told = nodes.count() > 1 and dist.get_backend(replicas) != "xla"
        state: list[Any] = [None]
        if not told or dist.get_rank(replicas) == 0:
            if not file.exists():
                raise UserError(f"{file} is not on this node: resuming on several nodes needs a shared folder")
            state[0] = torch.load(file, weights_only=True, map_location="cpu")
        if told:
            dist.broadcast_object_list(state, group=replicas, group_src=0)
        return state[0]


def _rank_file(mesh: Any) -> str:
    return f"tp_rank_{dist.get_rank(mesh['tensor_parallel'].get_group()):02d}.pt"


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
        """The first replica's ranks write a file each below the folder that the first rank renames when all have."""
        rank = dist.get_rank()
        target = self.folder / f"step_{step:08d}"
        with atomic_dir(target) if rank == 0 else contextlib.nullcontext():
            dist.barrier()
            state = module.training_state()
            if dist.get_rank(module.dp_group) == 0:
                with atomic_file(partial_path(target) / _rank_file(module.device_mesh)) as partial:
                    torch.save(state, partial)
            dist.barrier()
            if self.progress.curves:
                replicas = module.train_params.dp_size
                run = {"step": step, "progress": self.progress.state(), "replicas": replicas}
                write_json(partial_path(target) / RUN, run | {"threads": torch.get_num_threads()})
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
