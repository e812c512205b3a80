"""Training checkpoints: an interrupted run, even one that was killed, resumes from its last checkpoint.

    .scratch/checkpoints/<run>/<code>/step_00000040/tp_rank_00.pt …  one file per rank of the first replica
                                                    run.json         step, progress, where it ran
                                                    curves/          DVCLive's files up to that step
                                                    SHA256SUMS

<run> is a hash of the params and inputs that define the result; <code> is a hash of the code and arithmetic that
compute its numbers. A checkpoint of another <run> is never used. A checkpoint of the same run by other code is reported
and used only on request (--resume-from).

Deliberately not a DVC output: DVC deletes a stage's outputs before running it. Random numbers are a function of seed,
step and micro-batch (`LoraFinetuner.on_train_batch_start`), and the order of rows is a function of seed and epoch, so
neither is stored. All replicas are equal, so a checkpoint fits any number of replicas and nodes.
"""

import ast
import contextlib
import dataclasses
import functools
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

from trnlora.backends.frozen_linear import library_of_products
from trnlora.errors import UserError
from trnlora.files import atomic_dir, atomic_file, check_sums, partial_path, write_json, write_sums
from trnlora.readers import read_json
from trnlora.training import cluster
from trnlora.training.progress import TrainingProgress

CHECKPOINTS = Path(".scratch/checkpoints")
CURVES = "curves"
RUN = "run.json"
# The modules that compute a run's numbers. The others read, check, show or write them.
NUMERIC_MODULES = (
    "trnlora.model.", "trnlora.backends.",
    "trnlora.training.module", "trnlora.training.batches", "trnlora.training.schedule",
)  # fmt: skip


def run_folder(identity: dict[str, Any], code: dict[str, str]) -> Path:
    """The folder for checkpoints of the run that `identity` (JSON types) defines, by this code.

    identity: the params and the digests of the inputs. code: `numeric_code`.
    """
    return CHECKPOINTS / _digest(identity) / _digest(code)


@functools.cache  # what this process has imported, even if a file is edited during the run
def numeric_code(backend: str) -> dict[str, str]:
    """Identifies what computes a run's numbers: backend, imported modules, torch's version, instruction set, products.

    A module's digest covers its statements, not its comments, docstrings and line breaks. The instruction set counts
    because the last bits of sums depend on it, and a resumed run must end with the same bytes. (They also depend on
    threads and replicas, which `ResumePoint` records.)
    """
    modules = sorted(name for name in sys.modules if name.startswith(NUMERIC_MODULES))
    digests = {name: _digest(_statements(Path(str(sys.modules[name].__file__)))) for name in modules}
    code = digests | {
        "backend": backend,
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
    return code | {"products": library_of_products()} if backend == "cpu" else code


def _statements(source: Path) -> str:
    """The syntax tree of a Python file, without docstrings, as text."""
    tree = ast.parse(source.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def latest(folder: Path) -> Path | None:
    """The newest undamaged checkpoint in a run's folder."""
    for saved in reversed(_saved(folder)):
        try:
            check_sums(saved, "finetune_lora")
            return saved
        except UserError as error:
            print(f"skipping damaged checkpoint: {str(error).partition(': run ')[0]}", flush=True)
    return None


def find(folder: Path, chosen: Path | None, code: dict[str, str]) -> Path | None:
    """The checkpoint to resume from: `chosen`, or else the latest in `folder`; None for a new run.

    code: the present `numeric_code`. If `folder` has no checkpoint but other code or another backend has left some of
    the same run, prints how to use or delete them.
    Raises UserError if `chosen` is damaged, is not a checkpoint, or is of a run with other params or inputs.
    """
    if chosen is not None:
        if not (chosen / RUN).is_file():
            raise UserError(f"--resume-from {chosen} is not a checkpoint: name a folder {folder.parent}/…/step_N")
        if chosen.resolve().parents[1] != folder.parent.resolve():
            raise UserError(f"--resume-from {chosen} is of a run with other params or inputs, not in {folder.parent}")
        check_sums(chosen, "finetune_lora")
        return chosen
    found = latest(folder)
    others = [] if found else sorted(folder.parent.glob("*/step_*"), key=lambda saved: saved.name)
    if others:
        differing = ", ".join(_differing_code(others[-1], code))
        print(
            f"not resuming: the checkpoints of this run in {others[-1].parent} are by other code ({differing}). To use "
            f"the last one: python {sys.argv[0]} --resume-from {others[-1]}; to drop them: rm -r {others[-1].parent}",
            flush=True,
        )
    return found


def _differing_code(saved: Path, ours: dict[str, str]) -> list[str]:
    """The entries of `numeric_code` that differ from those of a checkpoint."""
    theirs = read_json(saved / RUN)["code"]
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


@dataclasses.dataclass(frozen=True)
class ResumePoint:
    """Where an interrupted run stopped. Read from a checkpoint's run.json, so all fields have JSON types."""

    folder: str  # of the checkpoint
    step: int  # optimizer steps done
    progress: dict[str, Any]  # `TrainingProgress.state`
    # These affect only the last digits of the result.
    replicas: int
    threads: int  # per rank
    code: dict[str, str]  # `numeric_code`
    logger_runs: dict[str, str]  # `Loggers.runs`

    @staticmethod
    def read(folder: Path) -> "ResumePoint":
        return ResumePoint(str(folder), **read_json(folder / RUN))

    def restore(self, mesh: Any, groups_carry_objects: bool) -> dict[str, Any]:
        """This rank's `LoraFinetuner.training_state`. Call on all ranks. mesh: that of `LoraFinetuner`.

        On several nodes, the first replica reads the state and sends it to the others, whose nodes need not have the
        folder. If process groups cannot carry objects, all nodes must share the folder; otherwise raises UserError.
        """
        replicas: dist.ProcessGroup = mesh["data_parallel"].get_group()
        file = Path(self.folder) / _rank_file(mesh)
        send = cluster.num_nodes() > 1 and groups_carry_objects
        state: list[Any] = [None]
        if not send or mesh["data_parallel"].get_local_rank() == 0:
            if not file.exists():
                raise UserError(f"{file} is not on this node: resuming on several nodes needs a shared folder")
            state[0] = torch.load(file, weights_only=True, map_location="cpu")
        if send:
            dist.broadcast_object_list(state, group=replicas, group_src=0)
        return state[0]


def _rank_file(mesh: Any) -> str:
    return f"tp_rank_{mesh['tensor_parallel'].get_local_rank():02d}.pt"


def restore_curves(saved: Path, target: Path) -> None:
    """Copy DVCLive's files as they were at the checkpoint to `target`, which must not exist."""
    shutil.copytree(saved / CURVES, target)


def fast_forward(trainer: pl.Trainer, step: int, steps_per_epoch: int) -> None:
    """Set Lightning's loops, before the fit, to the state after `step` optimizer steps.

    Lightning sees the interrupted epoch as a shorter one: the module's data loader starts where the run stopped.
    """
    epochs: Any = trainer.fit_loop.epoch_progress.current
    epochs.processed = epochs.completed = step // steps_per_epoch
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step


class Checkpoints(pl.Callback):
    """Writes a checkpoint every `every` optimizer steps, after each epoch and at the end, and keeps the last `kept`.

    A step that is validated is saved after its validation, which a resumed run does not repeat. Must come after
    `progress` among the trainer's callbacks, so that a step is counted before it is saved.
    """

    def __init__(self, folder: Path, code: dict[str, str], progress: TrainingProgress, every: int, kept: int):
        self.folder = folder
        self.code = code
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
        if step % self.every == 0 and not module.is_validated(step):
            self.save(step, trainer)

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.sanity_checking:
            return
        step = trainer.global_step
        at_the_end = step == module.total_steps or trainer.should_stop
        if step % self.every == 0 or step % module.steps_per_epoch == 0 or at_the_end:
            self.save(step, trainer)

    def save(self, step: int, trainer: pl.Trainer) -> None:
        """Each rank of the first replica writes a file to a folder that the first rank renames when all are done."""
        module: Any = trainer.lightning_module
        rank = dist.get_rank()
        target = self.folder / f"step_{step:08d}"
        with atomic_dir(target) if rank == 0 else contextlib.nullcontext():
            trainer.strategy.barrier("folder")
            state = module.training_state()
            if module.dp_rank == 0:
                with atomic_file(partial_path(target) / _rank_file(module.device_mesh)) as partial:
                    torch.save(state, partial)
            trainer.strategy.barrier("files")
            if self.progress.curves:
                write_json(partial_path(target) / RUN, self._run_at(step, module.train_params.dp_size))
                self.progress.flush()
                shutil.copytree(self.progress.curves.dir, partial_path(target) / CURVES)
                write_sums(partial_path(target))
        if rank == 0:
            for old in _saved(self.folder)[: -self.kept]:
                shutil.rmtree(old)

    def _run_at(self, step: int, replicas: int) -> dict[str, Any]:
        """The content of run.json, which `ResumePoint` reads."""
        return {
            "step": step,
            "progress": self.progress.state(),
            "replicas": replicas,
            "threads": torch.get_num_threads(),
            "code": self.code,
            "logger_runs": self.progress.loggers.runs(),
        }


def _saved(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*"))


def _let_sigterm_end_the_process() -> None:
    """Undo Lightning's handler: it waits for other ranks, which may be dead. Nothing needs to be saved."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
