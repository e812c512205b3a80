"""One training run, from the inputs on disk to the adapter's shards and the metrics. Runs on every rank."""

import contextlib
import dataclasses
import functools
import logging
import os
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from dvclive import Live
from torch import Tensor

from trnlora import paths
from trnlora.backends.training import TrainingBackend, training_backend
from trnlora.data.examples import SOURCES, row_name
from trnlora.errors import UserError
from trnlora.files import SUMS, check_sums, locked, partial_path, sha256, write_json, write_sums
from trnlora.metrics import stage_outputs, write_metrics
from trnlora.model.config import ModelConfig
from trnlora.model.decoder import DecoderLM
from trnlora.model.targets import adapter_tensors, nxd_adapter_config, trainable_parameters_per_rank
from trnlora.params import Params
from trnlora.readers import read_json
from trnlora.training import checkpoints, cluster
from trnlora.training.adapter_record import TRAINED_WITH, TrainedWith
from trnlora.training.batches import read_packed_rows, row_ids, steps_per_epoch
from trnlora.training.checkpoints import Checkpoints, ResumePoint
from trnlora.training.initial_adapter import random_lora_a, set_adapter
from trnlora.training.loggers import Loggers, open_loggers
from trnlora.training.module import LoraFinetuner, NotFinite
from trnlora.training.progress import TrainingProgress
from trnlora.weights.adapter_source import fetch_adapter
from trnlora.weights.peft_folder import CONFIG, WEIGHTS, read_init_adapter
from trnlora.weights.storage import PRETRAINED_TAG, rank_file

CURVES = Path(".scratch/curves")  # until the end of the run, so that DVC and another run leave them alone
# A run may resume with other values of these: they change the result by at most about 1e-5.
NOT_PART_OF_THE_RUN = {"checkpoint_every_steps", "checkpoints_kept", "dp_size", "loggers"}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The run's inputs. Rows as `read_packed_rows` returns them; digests by file name."""

    train_rows: dict[str, Tensor]
    validation_rows: dict[str, Tensor]
    steps_per_epoch: int
    total_steps: int
    digests: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Start:
    """What all ranks agree on before training: the folder of the checkpoints, and where to resume."""

    folder: Path
    code: dict[str, str]  # `checkpoints.numeric_code`
    resume: ResumePoint | None
    addresses: list[str]  # of all nodes

    @property
    def step(self) -> int:
        return self.resume.step if self.resume else 0


def train(params: Params, config: ModelConfig, kv_groups: list[list[int]], resume_from: Path | None) -> None:
    """Train the adapter and write its shards, the curves and the metrics. Called on every rank.

    kv_groups: ranks that hold the same KV heads; resume_from: a checkpoint to resume from, even if other code made it.
    Raises UserError if another process uses the outputs or writes the inputs, for damaged or missing inputs, a loss
    that is not finite, or a lost node.
    """
    quiet_lightning()
    if not is_first():
        train_locked(params, config, kv_groups, resume_from)
        return
    with locked(checkpoints.CHECKPOINTS):
        with stage_outputs("finetune_lora", paths.TRAINING_OUTPUTS, reads=paths.TRAINING_INPUTS):
            run_folder = train_locked(params, config, kv_groups, resume_from)
        shutil.rmtree(run_folder)  # the run is complete; starting it again trains from the beginning


def train_locked(params: Params, config: ModelConfig, kv_groups: list[list[int]], resume_from: Path | None) -> Path:
    """`train`, while no other process writes what it reads, or the same outputs. Returns the run's checkpoints."""
    backend = training_backend(params.backend)
    inputs = read_inputs(params)
    start = agree_on_start(params, inputs, resume_from)
    curves = open_curves(start)
    module = LoraFinetuner(
        build=functools.partial(build_model, backend, params, config, kv_groups),
        train=params.train,
        adapter=adapter_tensors(config, params.lora),
        train_rows=inputs.train_rows,
        validation_rows=inputs.validation_rows,
        total_steps=inputs.total_steps,
        step=start.step,
        restore=functools.partial(restore, backend, start.resume) if start.resume else None,
        load_init_adapter=functools.partial(load_init_adapter, params, config) if params.lora.init_adapter else None,
        sum_dtype=backend.SUM_DTYPE,
        check_finite=backend.computes(),
    )
    started = time.perf_counter()
    with cluster.name_lost_nodes(start.addresses):
        with own_loggers(params, start) as loggers:
            progress = TrainingProgress(
                inputs.total_steps, curves, loggers, **(start.resume.progress if start.resume else {})
            )
            trainer = make_trainer(params, backend, inputs, start, module, progress)
            kept_step = fit(trainer, module, start)
            if curves:
                curves.end()
                shutil.copytree(CURVES, partial_path(paths.CURVES), dirs_exist_ok=True)
            save_adapter(backend, params, inputs, trainer)
        write_results(params, config, inputs, trainer, kept_step, progress, time.perf_counter() - started)
    trainer.strategy.barrier("end")  # no rank exits while another one still communicates
    return start.folder.parent


def is_first() -> bool:
    """Whether this is the rank that writes the outputs that are not per rank."""
    return os.environ["RANK"] == "0"


def quiet_lightning() -> None:
    """Hide Lightning's banner and its advice on data loaders and logging, which does not fit tensor-parallel ranks."""
    for library in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning")


def read_inputs(params: Params) -> Inputs:
    """Check and read the packed rows, check this rank's shard, and count the optimizer steps."""
    if cluster.num_nodes() > 1:
        # The user may have started the ranks with torchrun, for other params.
        cluster.processes_per_node(cluster.num_nodes(), params.convert.tp_size, params.train.dp_size)
        cluster.choose_interface()
    check_sums(paths.MODEL, "fetch_model", [paths.MODEL_CONFIG.name])
    check_sums(paths.PREPARED, "prepare_data", ["train.parquet", "validation.parquet", SOURCES])
    shard = rank_file(paths.SHARDS, PRETRAINED_TAG, int(os.environ["RANK"]) % params.convert.tp_size)
    check_sums(paths.SHARDS, "convert_nxd", [str(shard.relative_to(paths.SHARDS))])
    train_rows = read_packed_rows(paths.PREPARED / "train.parquet")
    per_epoch = steps_per_epoch(len(train_rows["labels"]), params.train.global_batch_size)
    total_steps = per_epoch * params.train.epochs
    if params.train.max_steps is not None:
        total_steps = min(total_steps, params.train.max_steps)
    files = [paths.SHARDS / SUMS, paths.PREPARED / SUMS, paths.MODEL_CONFIG]
    digests = {str(file): sha256(file) for file in files}
    if params.lora.init_adapter:
        folder = fetch_adapter(params.lora.init_adapter)
        digests |= {f"lora.init_adapter {name}": sha256(folder / name) for name in (CONFIG, WEIGHTS)}
    return Inputs(
        train_rows,
        read_packed_rows(paths.PREPARED / "validation.parquet"),
        per_epoch,
        total_steps,
        digests,
    )


def agree_on_start(params: Params, inputs: Inputs, resume_from: Path | None) -> Start:
    """Check that all nodes have the same inputs, and let the first rank choose the checkpoint to resume from."""
    code = checkpoints.numeric_code(params.backend)
    folder = checkpoints.run_folder({**params_of_the_run(params), "inputs": inputs.digests}, code)
    found = checkpoints.find(folder, resume_from, code) if is_first() else None
    mine = dataclasses.asdict(ResumePoint.read(found)) if found else None
    addresses = cluster.check_same_inputs(inputs.digests | {"params.yaml": params.model_dump_json()})
    agreed = cluster.broadcast_from_first(mine)
    resume = ResumePoint(**agreed) if agreed else None
    if resume and is_first():
        print(f"resuming from step {resume.step} of {inputs.total_steps} ({resume.folder})", flush=True)
        if (resume.replicas, resume.threads) != (params.train.dp_size, torch.get_num_threads()):
            print(
                f"that checkpoint was made with {resume.replicas} replicas × {resume.threads} threads per rank, this "
                f"run has {params.train.dp_size} × {torch.get_num_threads()}: results may differ from those of an "
                "uninterrupted run in the last digits"
            )
    return Start(folder, code, resume, addresses)


def params_of_the_run(params: Params) -> dict[str, Any]:
    """The params that define the result of a training, section by section."""
    return {
        "convert": params.convert.model_dump(include={"hw_backend", "kv_size_multiplier", "tp_size"}),
        "lora": params.lora.model_dump(),
        "train": params.train.model_dump(exclude=NOT_PART_OF_THE_RUN),
    }


def open_curves(start: Start) -> Live | None:
    """DVCLive's curves, on the first rank. A resumed run starts with those of the checkpoint."""
    if not is_first():
        return None
    shutil.rmtree(CURVES, ignore_errors=True)
    if start.resume:
        checkpoints.restore_curves(Path(start.resume.folder), CURVES)
    return Live(str(CURVES), resume=start.resume is not None, dvcyaml=None, save_dvc_exp=False)


def own_loggers(params: Params, start: Start) -> contextlib.AbstractContextManager[Loggers]:
    """The loggers of `train.loggers` on the first rank, none on the others."""
    if not is_first():
        return contextlib.nullcontext(Loggers())
    return open_loggers(params, start.resume.logger_runs if start.resume else {}, start.step)


def build_model(
    backend: TrainingBackend, params: Params, config: ModelConfig, kv_groups: list[list[int]], mesh: Any
) -> DecoderLM:
    """This rank's model with a new adapter. mesh: the strategy's, with dims data_parallel and tensor_parallel."""
    model = backend.build_model(mesh, params, config, paths.SHARDS, kv_groups)
    set_adapter(model, random_lora_a(adapter_tensors(config, params.lora), params.train.seed), params.convert)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    expected = trainable_per_rank(params, config)
    assert trainable == expected, f"{trainable} trainable parameters on a rank, expected {expected}"
    return model


def load_init_adapter(params: Params, config: ModelConfig, model: DecoderLM) -> None:
    """Replace the new adapter's values by this rank's part of lora.init_adapter."""
    assert params.lora.init_adapter
    set_adapter(model, read_init_adapter(fetch_adapter(params.lora.init_adapter), config, params.lora), params.convert)


def trainable_per_rank(params: Params, config: ModelConfig) -> int:
    table = adapter_tensors(config, params.lora)
    return trainable_parameters_per_rank(table, params.convert.tp_size, params.convert.kv_size_multiplier)


def restore(backend: TrainingBackend, resume: ResumePoint, mesh: Any) -> dict[str, Any]:
    return resume.restore(mesh, backend.GROUPS_CARRY_OBJECTS)


def make_trainer(
    params: Params,
    backend: TrainingBackend,
    inputs: Inputs,
    start: Start,
    module: LoraFinetuner,
    progress: TrainingProgress,
) -> pl.Trainer:
    """Lightning's Trainer, set to the step at which the run resumes."""
    train = params.train
    saving = Checkpoints(start.folder, start.code, progress, train.checkpoint_every_steps, train.checkpoints_kept)

    def on_fit_start(*_: Any) -> None:  # all ranks have their models
        if cluster.num_nodes() > 1:
            trainer.strategy.barrier("models")
            cluster.limit_waiting([dist.group.WORLD, module.dp_group])

    trainer = pl.Trainer(
        **trainer_options(params, backend, inputs.total_steps),
        # The base model's loss: the whole validation set before the first step. A resumed run already has it.
        num_sanity_val_steps=0 if start.resume else -1,
        callbacks=[progress, saving, pl.callbacks.LambdaCallback(on_fit_start=on_fit_start)],
    )
    checkpoints.fast_forward(trainer, start.step, inputs.steps_per_epoch)
    return trainer


def trainer_options(params: Params, backend: TrainingBackend, total_steps: int) -> dict[str, Any]:
    """The arguments of Lightning's Trainer that every training with `LoraFinetuner` needs."""
    train = params.train
    return {
        **backend.trainer_placement(params),
        "devices": int(os.environ["LOCAL_WORLD_SIZE"]),
        "num_nodes": cluster.num_nodes(),
        "max_epochs": train.epochs,
        "max_steps": total_steps,
        "accumulate_grad_batches": train.global_batch_size // (train.micro_batch_size * train.dp_size),
        "inference_mode": False,  # gradients flow through tensors that a validation made: `DecoderLM._frequencies`
        "reload_dataloaders_every_n_epochs": 1,  # each epoch has its own order
        "use_distributed_sampler": False,  # MicroBatches distributes the rows over the replicas
        "enable_checkpointing": False,  # Lightning's hold the whole model, but not the position in an epoch
        "enable_progress_bar": False,  # TrainingProgress does this, and counts tokens
        "enable_model_summary": False,
        "logger": False,  # TrainingProgress writes the curves and has the loggers
    }


def fit(trainer: pl.Trainer, module: LoraFinetuner, start: Start) -> int:
    """Train, and choose the adapter that `train.keep` names. Returns its step.

    If a value is not finite, raises UserError with the step, the rows of the data and the last good checkpoint.
    """
    try:
        trainer.fit(module)
    except NotFinite as error:
        files = read_json(paths.PREPARED / SOURCES)
        rows = [row_name(files, id) for id in row_ids(paths.PREPARED / "train.parquet", error.rows)]
        of_rows = f" on {', '.join(rows[:20])}{' …' * (len(rows) > 20)}"
        raise UserError(
            f"{error}{of_rows if rows else ''}: lower train.lr or look for broken rows or weights; "
            f"last good checkpoint: {checkpoints.latest(start.folder) or 'none yet'}"
        ) from None
    lowest = f"the lowest validation loss is {module.best.loss:.4f}, of step {module.best.step}"
    if is_first() and trainer.global_step < module.total_steps:
        print(
            f"stopped early at step {trainer.global_step} of {module.total_steps}: {lowest}, and the "
            f"{module.best.later} validations since then (train.early_stopping_patience) were not lower",
            flush=True,
        )
    kept_step = module.choose_adapter()
    if is_first() and kept_step != trainer.global_step:
        print(f"keeping the adapter of step {kept_step} (train.keep: best): {lowest}", flush=True)
    trainer.strategy.barrier("fit")  # the last checkpoint and the lines above, before another rank can fail to write
    return kept_step


def save_adapter(backend: TrainingBackend, params: Params, inputs: Inputs, trainer: pl.Trainer) -> None:
    """Every rank writes its file, with what it comes from, to the partial folder that is put in place at the end."""
    module: Any = trainer.lightning_module
    partial = partial_path(paths.LORA_SHARDS)
    backend.save_adapter(partial, module.model)
    trainer.strategy.barrier("adapter")
    if is_first():
        write_json(partial / "adapter_config.json", nxd_adapter_config(params.lora))
        read = {"backend": params.backend, "model": {"dtype": params.model.dtype}, **params_of_the_run(params)}
        write_json(partial / TRAINED_WITH, TrainedWith(params=read, inputs=inputs.digests).model_dump())
        write_sums(partial)


def write_results(
    params: Params,
    config: ModelConfig,
    inputs: Inputs,
    trainer: pl.Trainer,
    kept_step: int,
    progress: TrainingProgress,
    seconds: float,
) -> None:
    """Write the metrics on the first rank. Call on all ranks, which report their memory.

    kept_step: of the adapter that is written. The train loss is that of the last step.
    """
    peaks = progress.peak_rss_gib()
    if not is_first():
        return
    module: Any = trainer.lightning_module
    metrics = {
        "train_loss": module.train_loss,
        "validation_loss": module.validation_loss,
        "base_validation_loss": module.base_validation_loss,
        "steps": trainer.global_step,
        "kept_step": kept_step,
        "stopped_early": trainer.global_step < inputs.total_steps,
        "steps_per_epoch": inputs.steps_per_epoch,
        "train_tokens": progress.tokens,
        "documents_per_epoch": int(inputs.train_rows["document_ids"].amax(1).sum()),
        "trainable_parameters_per_rank": trainable_per_rank(params, config),
    }
    timing = {
        "seconds": seconds,  # since the last start; the others cover the whole run
        "tokens_per_second": progress.tokens / progress.seconds,
        "peak_rss_gib_per_rank": max(peaks),
        "peak_rss_gib_all_ranks": sum(peaks),
    }
    write_metrics("finetune_lora", metrics, timing)
