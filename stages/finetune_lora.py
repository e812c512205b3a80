"""LoRA fine-tuning of the sharded model with tensor parallelism.

    python stages/finetune_lora.py [--params FILE]                      starts dp_size × tp_size ranks on this machine,
                                                                        or its part of them, one of several nodes
    torchrun --nproc_per_node N … stages/finetune_lora.py [--params …]  the same, with a rendezvous of your own

Several nodes: trnlora/nodes.py says which environment variables count, docs/scale.md how to start it. Each node reads
the inputs below; the first one alone writes.

A run that was stopped, by whatever, goes on from its last checkpoint in .scratch/checkpoints when it is started again
with the same inputs, params and code, and ends in the same bytes (trnlora/resume.py).

Reads   artifacts/shards, artifacts/model/config.json, artifacts/prepared/{train,validation}.parquet
Writes  artifacts/lora_adapter/lora/model/dp_rank_00_tp_rank_RR_pp_rank_00.pt and adapter_config.json (NxD's paths),
        metrics/finetune_lora.json, metrics/timing/finetune_lora.json, plots/training (DVCLive's curves)
"""

import argparse
import contextlib
import ctypes
import dataclasses
import logging
import os
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from trnlora import nodes, paths
from trnlora.architecture import LlamaConfig
from trnlora.errors import UserError, explain, run
from trnlora.files import SUMS, atomic_dir, check_sums, clear_partial, partial_path, sha256, write_json, write_sums
from trnlora.layout import check_divisible, kv_replica_groups, trainable_parameters
from trnlora.params import Params, load_params
from trnlora.trainium import training_environment

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>: the signal that a process gets when its parent dies


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
        return
    if command := nodes.srun_command([sys.executable, "-u", *sys.argv]):
        sys.stdout.flush()
        os.execvp(command[0], command)  # SLURM's batch script runs on its first node alone
    here = nodes.from_environment()
    processes = nodes.processes_per_node(here.count, params.convert.tp_size, params.train.dp_size)
    if params.backend == "nxd":
        enter_neuron(params, here)
    launch(here, processes, params.train.threads)


def enter_neuron(params: Params, here: nodes.Nodes) -> None:
    """Run this script anew with the Python and the environment variables that Trainium needs, if it is not so yet."""
    python = params.neuron.python or sys.executable
    env = training_environment(params, here)
    if python == sys.executable and env.items() <= os.environ.items():
        return
    if not os.access(python, os.X_OK):
        raise UserError(f"neuron.python {python} is no Python: name that of your Neuron environment in params.yaml")
    sys.stdout.flush()
    os.execve(python, [python, "-u", __file__, *sys.argv[1:]], {**os.environ, **env})


def launch(here: nodes.Nodes, processes: int, threads: int | None) -> None:
    """Start this node's ranks with torchrun's launcher and wait; the first failure of one becomes the one error line.

    A rank that dies ends the others of its node at once: the launcher looks after them every 0.2 s, and SIGTERM ends a
    rank without delay. Those of other nodes hear of it from their connections to it.
    """
    from torch.distributed import DistNetworkError, DistStoreError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.update(rank_environment(processes, threads))
    launch_config = LaunchConfig(
        min_nodes=here.count, max_nodes=here.count, nproc_per_node=processes,
        # static: the node that is named the first has rank 0, which writes. c10d finds a free port on its own.
        rdzv_backend="c10d" if here.count == 1 else "static", rdzv_endpoint=f"{here.address}:{here.port}",
        rdzv_configs={} if here.count == 1 else {"rank": here.rank, "timeout": nodes.START_SECONDS},
        run_id="finetune_lora", max_restarts=0, monitor_interval=0.2, log_line_prefix_template=None,
    )  # fmt: skip
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # its page on a failure: see below
    try:
        elastic_launch(launch_config, sys.executable)("-u", __file__, *sys.argv[1:])
    except SignalException as error:
        clear_partial(paths.LORA_SHARDS)
        raise UserError(f"training was stopped by {error.sigval.name}; run it again to go on") from None
    except (DistNetworkError, DistStoreError) as error:
        raise UserError(
            f"{here.count} nodes did not meet at {here.address}:{here.port} within {nodes.START_SECONDS} s "
            f"({str(error).splitlines()[0]}): start the stage on all of them, with ports open between them"
        ) from None
    except ChildFailedError as error:
        clear_partial(paths.LORA_SHARDS)
        # The ranks that waited for the failed one fail too, within the same second, and may be heard of before it: a
        # reason for the user goes first, then a signal, which nobody gets from another rank's end.
        told = [rank for rank in error.failures if failure_text(error.failures[rank])[0].startswith("UserError: ")]
        killed = [rank for rank, failure in error.failures.items() if failure.exitcode < 0]
        rank = next(iter(told + killed), error.get_first_failure()[0])
        reason, traceback = failure_text(error.failures[rank])
        if not told and traceback:
            print(traceback, file=sys.stderr)
        if "(SIGKILL)" in reason:
            reason += " (where nobody sent it, the memory was full: see dmesg); run it again to go on"
        raise UserError(f"training stopped, rank {rank} failed: {reason.removeprefix('UserError: ')}") from None


def rank_environment(processes: int, threads: int | None) -> dict[str, str]:
    """Environment variables of the ranks, `processes` on this machine; what the user has set stays."""
    env = {
        # More threads than cores make every rank wait for the others' time slices.
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // processes)),
        # glibc would raise this to 32 MiB by itself and keep large freed tensors in its heap, which they fragment:
        # 4.9 GiB in place of 3.0 after three steps of 2,048 tokens. Below 4 MiB, short rows would be a fifth slower.
        "MALLOC_MMAP_THRESHOLD_": str(2**22),
        "MALLOC_TRIM_THRESHOLD_": str(2**28),
        # MKL must not take fewer threads when the machine is busy: sums would differ in the last bits.
        "MKL_DYNAMIC": "FALSE",
    }
    env = {name: os.environ.get(name, value) for name, value in env.items()}
    return env if threads is None else env | {"OMP_NUM_THREADS": str(threads)}


def failure_text(failure: Any) -> tuple[str, str]:
    """What a failed rank said: its exception (or the signal that ended it) and its traceback, if it left one."""
    said = failure.error_file_data["message"]
    return (said["message"], said["extraInfo"]["py_callstack"]) if isinstance(said, dict) else (failure.message, "")


def import_lightning() -> Any:
    """pytorch_lightning, without the models of transformers: its torchmetrics would import them, if the package is
    there, for scores that nobody asks for here. That is 3 s and 40 MiB of every rank."""
    from unittest.mock import patch

    from lightning_utilities.core.imports import RequirementCache

    met = RequirementCache.__bool__
    with patch.object(RequirementCache, "__bool__", lambda r: "transformers" not in str(r.requirement) and met(r)):
        import pytorch_lightning

    return pytorch_lightning


def train(params: Params, config: LlamaConfig, kv_groups: list[list[int]]) -> None:
    pl = import_lightning()
    import torch
    import torch.distributed as dist
    from dvclive import Live
    from pytorch_lightning.strategies import ModelParallelStrategy

    from trnlora import resume
    from trnlora.backends.torch import process_backend
    from trnlora.batches import read_rows, source_rows
    from trnlora.checkpoint import LORA_TAG, PRETRAINED_TAG, load_rank, rank_file, save_rank
    from trnlora.finetuner import LoraFinetuner, NotFinite
    from trnlora.llama import Llama
    from trnlora.lora import adapter_state, add_lora, draw_lora_a, nxd_adapter_config
    from trnlora.progress import TrainingProgress

    on_neuron = params.backend == "nxd"
    if on_neuron:
        from trnlora.backends import neuron

        warnings.filterwarnings("ignore", category=FutureWarning, module="neuronx_distributed")

    # Lightning's banner and its advice on data loaders and logging, which do not hold for tensor-parallel ranks.
    for library in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning")

    rank, is_first = int(os.environ["RANK"]), os.environ["RANK"] == "0"
    tp_size, dp_size = params.convert.tp_size, params.train.dp_size
    if nodes.count() > 1:
        nodes.processes_per_node(nodes.count(), tp_size, dp_size)  # torchrun started them, perhaps of other params
        nodes.choose_interface()
    check_sums(paths.MODEL, "fetch_model", [paths.MODEL_CONFIG.name])
    check_sums(paths.PREPARED, "prepare_data", ["train.parquet", "validation.parquet"])
    shard_file = rank_file(paths.SHARDS, PRETRAINED_TAG, rank % tp_size)
    check_sums(paths.SHARDS, "convert_nxd", [str(shard_file.relative_to(paths.SHARDS))])
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
            model = Llama.from_shard(config, backend, params.convert.kv_size_multiplier, load_rank(shard_file))
            add_lora(model, params.lora)
            model.recompute_layers = params.train.activation_checkpointing
        draw_lora_a(model, params.train.seed)
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
    # The same result to about 1e-5 however many replicas: a run may go on with another number of them.
    no_part_of_the_run = {"checkpoint_every_steps", "checkpoints_kept", "dp_size"}
    inputs = {str(file): sha256(file) for file in (paths.SHARDS / SUMS, paths.PREPARED / SUMS, paths.MODEL_CONFIG)}
    run_folder = resume.run_folder(
        {
            "backend": params.backend,
            "convert": params.convert.model_dump(include={"hw_backend", "kv_size_multiplier", "tp_size"}),
            "lora": params.lora.model_dump(),
            "train": params.train.model_dump(exclude=no_part_of_the_run),
            "inputs": inputs,
        }
    )
    checkpoint = resume.latest(run_folder) if is_first else None
    found = dataclasses.asdict(resume.Begun.read(checkpoint)) if checkpoint else None
    addresses, found = nodes.meet(inputs | {"params.yaml": params.model_dump_json()}, found)
    begun = resume.Begun(**found) if found else None
    step = begun.step if begun else 0
    curves = None
    if is_first:
        if begun:
            print(f"going on from step {step} of {total_steps} ({begun.folder})", flush=True)
            if (begun.replicas, begun.threads) != (dp_size, torch.get_num_threads()):
                print(
                    f"it was made by {begun.replicas} replicas with {begun.threads} threads a rank, not by "
                    f"{dp_size} with {torch.get_num_threads()}: the last digits will not be those of one unbroken run"
                )
            resume.restore_curves(Path(begun.folder), paths.PLOTS / "training")
        curves = Live(str(paths.PLOTS / "training"), resume=begun is not None, dvcyaml=None, save_dvc_exp=False)
    module = LoraFinetuner(
        build, params.train, train_rows, validation_rows, total_steps, step, begun.load if begun else None
    )
    progress = TrainingProgress(total_steps, curves, **(begun.progress if begun else {}))
    checkpoints = resume.Checkpoints(
        run_folder, progress, params.train.checkpoint_every_steps, params.train.checkpoints_kept
    )

    def all_have_their_models(*_: Any) -> None:
        if nodes.count() > 1:
            nodes.limit_waiting([dist.group.WORLD, module.dp_group])

    trainer = pl.Trainer(
        **placement,
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        num_nodes=nodes.count(),
        max_epochs=params.train.epochs,
        max_steps=total_steps,
        accumulate_grad_batches=params.train.global_batch_size // (params.train.micro_batch_size * dp_size),
        # At the start the whole validation set once: the base model's loss. A resumed run has it.
        num_sanity_val_steps=0 if begun else -1,
        reload_dataloaders_every_n_epochs=1,  # each epoch has an order of its own
        use_distributed_sampler=False,  # MicroBatches cuts the rows for each replica
        enable_checkpointing=False,  # Lightning's holds the whole model, and not where in an epoch it was made
        enable_progress_bar=False,  # TrainingProgress, which also counts tokens
        enable_model_summary=False,
        callbacks=[progress, checkpoints, pl.callbacks.LambdaCallback(on_fit_start=all_have_their_models)],
        logger=False,  # TrainingProgress keeps the curves
    )
    resume.fast_forward(trainer, step, steps_per_epoch)
    started = time.perf_counter()
    # Held from the start, so that no second run writes the same out.
    with nodes.lost_nodes_named(addresses), atomic_dir(paths.LORA_SHARDS) if is_first else contextlib.nullcontext():
        try:
            trainer.fit(module)
        except NotFinite as error:
            lines = source_rows(paths.PREPARED / "train.parquet", error.rows)
            of_lines = f" on lines {', '.join(map(str, lines[:20]))}{' …' * (len(lines) > 20)} of data.source"
            raise UserError(
                f"{error}{of_lines if lines else ''}: lower train.lr or look for broken rows or weights; "
                f"last good checkpoint: {resume.latest(run_folder) or 'none yet'}"
            ) from None
        if module.validated_step != trainer.global_step:  # max_steps ended in the middle of an epoch
            trainer.validate(module, verbose=False)
        if curves:
            curves.end()

        # Every rank writes its file below the folder that the first rank renames at the end.
        assert module.model is not None
        partial = partial_path(paths.LORA_SHARDS)
        if on_neuron:
            neuron.save_adapter(partial, module.model)
        elif rank < tp_size:  # data-parallel replicas hold equal adapters
            save_rank(rank_file(partial, LORA_TAG, rank), adapter_state(module.model))
        dist.barrier()
        if is_first:
            write_json(partial / "adapter_config.json", nxd_adapter_config(params.lora))
            write_sums(partial)

    with nodes.lost_nodes_named(addresses):
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
            "seconds": time.perf_counter() - started,  # of this start; what follows counts the whole run
            "tokens_per_second": progress.tokens / progress.seconds,
            "peak_rss_gib_per_rank": max(peaks),
            "peak_rss_gib_all_ranks": sum(peaks),
        }
        write_json(paths.METRICS / "timing" / "finetune_lora.json", timing)
        shutil.rmtree(run_folder)  # the run is done: asked to run again, it trains again
    dist.barrier()  # nobody leaves while another still talks


def rank_main() -> None:
    """A rank's main. What ends it is told to the launcher alone, which shows it once and not from every rank."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    handler = get_error_handler()
    handler.initialize()
    # The launcher starts ranks in sessions of their own, where nothing that ends the launcher would reach them.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends the rank at once: nothing but a checkpoint could be saved
    try:
        main()
    except Exception as error:
        line = explain(error)
        handler.record_exception(UserError(line) if line else error)
        # No ordinary exit here either: threads that wait for the other ranks could hold it up.
        os._exit(1)
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
