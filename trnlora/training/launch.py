"""Starting the ranks of a training run: torchrun's launcher, the ranks' environment, and how a failure is reported."""

import ctypes
import logging
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NoReturn

from trnlora.backends import environment, neuron_machine
from trnlora.errors import UserError, explain, print_anything
from trnlora.files import check_unlocked, clear_partial
from trnlora.params import Params
from trnlora.training import cluster
from trnlora.training.cluster import Nodes
from trnlora.training.loggers import check_installed

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>: the signal that a process gets when its parent dies
MIN_OPEN_FILES = 256
LATER_SECONDS = 2  # the launcher checks its ranks ten times in this time


def start_ranks(
    params: Params,
    train: Callable[..., None],
    *arguments: Any,
    outputs: Sequence[Path] = (),
    reads: Sequence[Path] = (),
) -> None:
    """Start this node's ranks of dp_size × tp_size, each calling train(*arguments), and wait for them.

    train: a function at the top level of a module that does not import torch. outputs, reads: what the first rank
    locks, as in `atomic_outputs`. In the batch script of a SLURM job, starts the script on every node of the job
    instead. Raises UserError of one line if another process uses the outputs, if a logger is not installed, if a rank
    fails, if a signal stops the training, or if the nodes do not meet.
    """
    if command := cluster.srun_command([sys.executable, "-u", *sys.argv]):
        sys.stdout.flush()
        os.execvp(command[0], command)  # SLURM runs the batch script on the first node only
    nodes = cluster.from_environment()
    ranks = cluster.processes_per_node(nodes.count, params.convert.tp_size, params.train.dp_size)
    if (allowed := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) < MIN_OPEN_FILES:  # torchrun would wait for ever
        raise UserError(f"{allowed} open files allowed, training needs {MIN_OPEN_FILES}: raise the limit (`ulimit -n`)")
    if nodes.rank == 0:
        for output in outputs:
            check_unlocked(output)
        for folder in reads:
            check_unlocked(folder, shared=True)
    environment.enter(params, ranks, nodes.count, nodes.address)
    if nodes.rank == 0:  # of which a rank opens the loggers
        check_installed(params.train.loggers)
    os.environ.update(rank_environment(ranks, params.train.threads))
    if environment.ranks_may_be_forked(params):
        # A server that imports what training needs and then forks one rank per request, so the libraries are imported
        # once and are in memory once, not per rank. It starts now, while this process does its own imports.
        multiprocessing.set_forkserver_preload(["trnlora.training.rank_server"])
        forkserver.ensure_running()
        launch: list[Any] = [_forked_rank, train, *arguments]
    else:
        launch = [sys.executable, "-u", *sys.argv]
    try:
        _launch(nodes, ranks, *launch)
    except UserError:
        clear_partial(*outputs)  # of a rank that was killed
        raise


def rank_environment(ranks: int, threads: int | None) -> dict[str, str]:
    """Environment variables of the `ranks` ranks on this machine. Variables that the user has set keep their values."""
    env = {
        # With more threads than cores, the ranks would wait for each other.
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks)),
        # A thread that waits for another one looks this often before it sleeps. GNU's OpenMP looks 300,000 times (about
        # 1 ms), in which the other thread, on a busy machine, does not run: 130 to 3,200 tokens/s instead of 4,400.
        "GOMP_SPINCOUNT": "1000",
        # glibc would raise this to 32 MiB and keep large freed tensors in its heap, which then fragments: 4.9 GiB
        # instead of 3.0 after three steps of 2,048 tokens, and 3.6 with 8 MiB. Below 4 MiB, short rows would be 20 %
        # slower.
        "MALLOC_MMAP_THRESHOLD_": str(2**22),
        "MALLOC_TRIM_THRESHOLD_": str(2**28),
        # MKL must not use fewer threads on a busy machine: the last bits of sums would differ.
        "MKL_DYNAMIC": "FALSE",
    }
    env = {name: os.environ.get(name, value) for name, value in env.items()}
    return env if threads is None else env | {"OMP_NUM_THREADS": str(threads)}


def _launch(nodes: Nodes, ranks: int, entrypoint: Callable[..., None] | str, *arguments: Any) -> None:
    """Run torchrun's launcher on a function or a command.

    When a rank dies, the launcher ends the others of its node: it checks them every 0.2 s, and SIGTERM ends a rank
    immediately. Ranks on other nodes notice from their connections to it.
    """
    from torch.distributed import DistNetworkError, DistStoreError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    launch_config = LaunchConfig(
        min_nodes=nodes.count, max_nodes=nodes.count, nproc_per_node=ranks,
        # static: the first node gets rank 0, which writes the outputs. c10d finds a free port by itself.
        rdzv_backend="c10d" if nodes.count == 1 else "static", rdzv_endpoint=f"{nodes.address}:{nodes.port}",
        rdzv_configs={} if nodes.count == 1 else {"rank": nodes.rank, "timeout": cluster.START_SECONDS},
        run_id="finetune_lora", max_restarts=0, monitor_interval=0.2, log_line_prefix_template=None,
        start_method="forkserver",  # for a function
        signals_to_handle="SIGTERM,SIGHUP,SIGQUIT",  # it would pass SIGINT on to the ranks, which ignore it, for 30 s
    )  # fmt: skip
    # Its own failure report is a page long. It is replaced by one line below.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        elastic_launch(launch_config, entrypoint)(*arguments)
    except SignalException as error:
        raise UserError(f"training stopped by {error.sigval.name}; rerun to resume from the last checkpoint") from None
    except KeyboardInterrupt:
        raise UserError("training stopped by Ctrl-C; rerun to resume from the last checkpoint") from None
    except (DistNetworkError, DistStoreError) as error:
        raise UserError(
            f"{nodes.count} nodes did not meet at {nodes.address}:{nodes.port} within {cluster.START_SECONDS} s "
            f"({str(error).splitlines()[0]}): start the stage on all of them, with ports open between them"
        ) from None
    except ChildFailedError as error:
        _report_failure(error)


def _report_failure(error: Any) -> NoReturn:
    """Raise UserError with the reason of torchrun's ChildFailedError. Prints a traceback first if the reason is a bug.

    The ranks that waited for the failed one fail within the same second and may be reported before it. So a UserError
    takes precedence, then a signal, which no rank gets just because another one has ended.
    """
    with_reason = [rank for rank, failure in error.failures.items() if _reason(failure)[0].startswith("UserError: ")]
    killed = [rank for rank, failure in error.failures.items() if failure.exitcode < 0]
    rank = next(iter(with_reason + killed), error.get_first_failure()[0])
    reason, traceback = _reason(error.failures[rank])
    if not with_reason and traceback:
        print(traceback, file=sys.stderr)
    if "(SIGKILL)" in reason:
        reason += " (if you did not send it, the OOM killer probably did: see dmesg); rerun to resume"
    raise UserError(f"training stopped, rank {rank} failed: {reason.removeprefix('UserError: ')}") from None


def _reason(failure: Any) -> tuple[str, str]:
    """A failed rank's exception, or the signal that ended it, and its traceback, if any."""
    message = failure.error_file_data["message"]
    if isinstance(message, dict):
        return message["message"], message["extraInfo"]["py_callstack"]
    return failure.message, ""


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent ends for any reason."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _forked_rank(train: Callable[..., None], *arguments: Any) -> None:
    """Entry point of a forked rank."""
    run_rank(lambda: train(*arguments))


def run_rank(main: Callable[[], None]) -> None:
    """Run `main` as a rank. Reports a failure to the launcher only, which prints it once instead of once per rank."""
    neuron_machine.pin_rank()  # before torch, whose threads are then pinned too
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    handler = get_error_handler()
    handler.initialize()
    end_with_parent()  # the parent is the launcher, or the server that has forked this rank
    print_anything()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # at once: other ranks may be dead
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the launcher, which ends the ranks
    try:
        main()
    except Exception as error:
        line = explain(error)
        handler.record_exception(UserError(line) if line else error)
        if not line:
            # Probably another rank has died and the connection to it failed. Let the launcher see that rank first.
            time.sleep(LATER_SECONDS)
        # Not a normal exit: threads that wait for other ranks could block it.
        os._exit(1)
