"""Work on the chunks of a large file in several processes, with the results in the order of the file."""

import contextlib
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from trnlora.data import rows
from trnlora.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

_work: Callable[[Any], Any]  # of a worker process, set when it starts


def worker_count(files: Sequence[rows.RowsFile]) -> int:
    """How many processes share the chunks of files: one per core, but not more than they have full chunks."""
    size = sum(file.path.stat().st_size for file in files)
    return min(len(os.sched_getaffinity(0)), size // rows.CHUNK_BYTES)


@contextlib.contextmanager
def map_in_order(work: Callable[[Task], Result], tasks: Sequence[Task], processes: int) -> Iterator[Iterator[Result]]:
    """Yield an iterator over work(task) of every task, in the order of the tasks.

    With fewer than two processes, the work is done in this one: a small file is not worth starting others. Otherwise
    `work` is pickled and sent once to each process, so it may carry something large, such as a tokenizer. Only a few
    results are computed ahead of the one that is taken, so that they do not pile up in memory. An exception in `work`
    or in the with block cancels the tasks that have not begun. Raises UserError when a process was killed.
    """
    if processes < 2:
        yield map(work, tasks)
        return
    context = multiprocessing.get_context("spawn")  # the threads of tokenizers do not survive a fork
    with ProcessPoolExecutor(processes, context, initializer=_start_worker, initargs=(work,)) as pool:
        try:
            yield _results_in_order(pool, tasks, ahead=2 * processes)
        except BrokenProcessPool:
            raise UserError(
                "a process that reads the rows was killed, perhaps because memory ran out: close other programs and "
                "rerun"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _results_in_order(pool: Executor, tasks: Sequence[Any], ahead: int) -> Iterator[Any]:
    waiting: deque[Future[Any]] = deque()
    for task in tasks:
        waiting.append(pool.submit(_run, task))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _start_worker(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there already is a process per core


def _run(task: Any) -> Any:
    return _work(task)
