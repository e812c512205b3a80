"""LoRA fine-tuning of the sharded model with tensor parallelism.

    python stages/finetune_lora.py [--params FILE]                      starts dp_size × tp_size ranks on this machine
    torchrun --nproc_per_node N … stages/finetune_lora.py [--params …]  the same, with a rendezvous of your own

Reads   artifacts/shards, artifacts/model/config.json, artifacts/prepared/{train,validation}.parquet
Writes  artifacts/lora_adapter/lora/model/dp_rank_00_tp_rank_RR_pp_rank_00.pt and adapter_config.json (NxD's paths),
        metrics/finetune_lora.json, metrics/timing/finetune_lora.json, plots/training (DVCLive's curves)
"""

import argparse
import contextlib
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from trnlora import paths
from trnlora.architecture import LlamaConfig
from trnlora.errors import UserError, run
from trnlora.files import atomic_dir, partial_path, write_json
from trnlora.layout import check_divisible, kv_replica_groups
from trnlora.params import Params, load_params
from trnlora.trainium import training_environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--params", type=Path, default=paths.PARAMS, metavar="FILE")
    args = parser.parse_args()
    params = load_params(args.params)
    config = LlamaConfig.from_folder(paths.MODEL)
    check_divisible(config, params.convert)
    kv_groups = kv_replica_groups(config, params.convert)
    if "RANK" in os.environ:  # torchrun's, one process a rank
        train(params, config, kv_groups)
    else:
        if params.backend == "neuron":
            enter_neuron(params)
        launch(params.train.dp_size * params.convert.tp_size)


def enter_neuron(params: Params) -> None:
    """Run this script anew with the Python and the environment variables that Trainium needs, if it is not so yet."""
    python = params.neuron.python or sys.executable
    env = training_environment(params)
    if python == sys.executable and env.items() <= os.environ.items():
        return
    if not os.access(python, os.X_OK):
        raise UserError(f"neuron.python {python} is no Python: name that of your Neuron environment in params.yaml")
    sys.stdout.flush()
    os.execve(python, [python, "-u", __file__, *sys.argv[1:]], {**os.environ, **env})


def launch(processes: int) -> None:
    """Start the ranks with torchrun's launcher and wait; the first failure of a rank becomes the one error line."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # More threads than cores make every rank wait for the others' time slices.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    launch_config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0",
        run_id="finetune_lora", max_restarts=0, monitor_interval=0.2, log_line_prefix_template=None,
    )  # fmt: skip
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # its page on a failure: see below
    try:
        elastic_launch(launch_config, sys.executable)("-u", __file__, *sys.argv[1:])
    except ChildFailedError as error:
        # The ranks that waited for the failed one fail too, within the same second: a reason for the user goes first.
        told = [rank for rank in error.failures if failure_text(error.failures[rank])[0].startswith("UserError: ")]
        rank = told[0] if told else error.get_first_failure()[0]
        reason, traceback = failure_text(error.failures[rank])
        if not told:
            print(traceback, file=sys.stderr)
        raise UserError(f"training stopped, rank {rank} failed: {reason.removeprefix('UserError: ')}") from None


def failure_text(failure: Any) -> tuple[str, str]:
    """What a failed rank said: its exception (or the signal that ended it) and its traceback, if it left one."""
    said = failure.error_file_data["message"]
    return (said["message"], said["extraInfo"]["py_callstack"]) if isinstance(said, dict) else (failure.message, "")


def train(params: Params, config: LlamaConfig, kv_groups: list[list[int]]) -> None:
    import pytorch_lightning as pl
    import torch
    import torch.distributed as dist
    from dvclive import Live
    from pytorch_lightning.strategies import ModelParallelStrategy

    from trnlora.backends.torch import process_backend
    from trnlora.batches import read_rows
    from trnlora.checkpoint import LORA_TAG, PRETRAINED_TAG, load_rank, rank_file, save_rank
    from trnlora.finetuner import LoraFinetuner
    from trnlora.llama import Llama
    from trnlora.lora import adapter_state, add_lora, draw_lora_a, nxd_adapter_config, trainable_parameters
    from trnlora.progress import TrainingProgress

    on_neuron = params.backend == "neuron"
    if on_neuron:
        from trnlora.backends import neuron

        warnings.filterwarnings("ignore", category=FutureWarning, module="neuronx_distributed")

    # Lightning's banner and its advice on data loaders and logging, which do not hold for tensor-parallel ranks.
    for library in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning")

    tp_size, dp_size = params.convert.tp_size, params.train.dp_size
    train_rows = read_rows(paths.PREPARED / "train.parquet")
    validation_rows = read_rows(paths.PREPARED / "validation.parquet")
    steps_per_epoch = -(-len(train_rows["labels"]) // params.train.global_batch_size)
    total_steps = steps_per_epoch * params.train.epochs
    if params.train.max_steps is not None:
        total_steps = min(total_steps, params.train.max_steps)

    def build(mesh: Any) -> Llama:
        if on_neuron:
            model = neuron.build_model(mesh, params, config, paths.SHARDS, kv_groups)
        else:
            backend = process_backend(mesh["tensor_parallel"].get_group(), kv_groups, dp_size)
            shard = load_rank(rank_file(paths.SHARDS, PRETRAINED_TAG, backend.tp_rank))
            model = Llama.from_shard(config, backend, params.convert.kv_size_multiplier, shard)
            add_lora(model, params.lora)
        draw_lora_a(model, params.train.seed)
        # From here on only dropout draws: alike on tensor-parallel ranks, which share their input, and different
        # on replicas, which do not.
        seed = params.train.seed + 1 + dist.get_rank(mesh["data_parallel"].get_group())
        torch.manual_seed(seed)
        if on_neuron:
            neuron.seed_device(seed)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        expected = trainable_parameters(config, params.convert.kv_size_multiplier, tp_size, params.lora)
        assert trainable == expected, f"{trainable} trainable parameters on a rank, expected {expected}"
        return model

    if on_neuron:
        placement = neuron.trainer_placement(params)
    else:
        placement = {
            "accelerator": "gpu" if params.backend == "cuda" else "cpu",
            "strategy": ModelParallelStrategy(data_parallel_size=dp_size, tensor_parallel_size=tp_size),
        }
    module = LoraFinetuner(build, params.train, train_rows, validation_rows, total_steps)
    is_first = os.environ["RANK"] == "0"
    curves = Live(str(paths.PLOTS / "training"), dvcyaml=None, save_dvc_exp=False) if is_first else None
    progress = TrainingProgress(total_steps, curves)
    trainer = pl.Trainer(
        **placement,
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")),
        max_epochs=params.train.epochs,
        max_steps=total_steps,
        accumulate_grad_batches=params.train.global_batch_size // (params.train.micro_batch_size * dp_size),
        num_sanity_val_steps=-1,  # the whole validation set once before the first step: the base model's loss
        reload_dataloaders_every_n_epochs=1,  # each epoch has an order of its own
        use_distributed_sampler=False,  # MicroBatches cuts the rows for each replica
        enable_checkpointing=False,
        enable_progress_bar=False,  # TrainingProgress, which also counts tokens
        enable_model_summary=False,
        callbacks=[progress],
        logger=False,  # TrainingProgress keeps the curves
    )
    started = time.perf_counter()
    trainer.fit(module)
    if module.validated_step != trainer.global_step:  # max_steps ended in the middle of an epoch
        trainer.validate(module, verbose=False)
    if curves:
        curves.end()

    # Every rank writes its file below the folder that the first rank renames at the end.
    assert module.model is not None
    with atomic_dir(paths.LORA_SHARDS) if is_first else contextlib.nullcontext():
        dist.barrier()
        partial = partial_path(paths.LORA_SHARDS)
        if on_neuron:
            neuron.save_adapter(partial, module.model)
        elif dist.get_rank() < tp_size:  # data-parallel replicas hold equal adapters
            save_rank(rank_file(partial, LORA_TAG, module.model.backend.tp_rank), adapter_state(module.model))
        if is_first:
            write_json(partial / "adapter_config.json", nxd_adapter_config(params.lora))
        dist.barrier()

    peaks = progress.peak_rss_gib()
    if is_first:
        metrics = {
            "train_loss": module.train_loss,
            "validation_loss": module.validation_loss,
            "base_validation_loss": module.base_validation_loss,
            "steps": trainer.global_step,
            "steps_per_epoch": steps_per_epoch,
            "train_tokens": progress.tokens,
            "documents_per_epoch": int(train_rows["document_ids"].amax(1).sum()),
            "trainable_parameters_per_rank": trainable_parameters(
                config, params.convert.kv_size_multiplier, tp_size, params.lora
            ),
        }
        write_json(paths.METRICS / "finetune_lora.json", metrics)
        timing = {
            "seconds": time.perf_counter() - started,
            "tokens_per_second": progress.tokens / progress.seconds,
            "peak_rss_gib_per_rank": max(peaks),
            "peak_rss_gib_all_ranks": sum(peaks),
        }
        write_json(paths.METRICS / "timing" / "finetune_lora.json", timing)
    dist.barrier()  # nobody leaves while another still talks


def rank_main() -> None:
    """A rank's main. What ends it is told to the launcher alone, which shows it once and not from every rank."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    handler = get_error_handler()
    handler.initialize()
    try:
        main()
    except Exception as error:
        handler.record_exception(error)
        sys.exit(1)
    # All is written. An ordinary exit can abort instead ("terminate called without an active exception") when gloo's
    # threads meet the interpreter's end, which would fail a run that is done.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    if "RANK" in os.environ:
        rank_main()
    else:
        run(main)
