"""Functions that run in several processes, the ranks of a gloo group."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_ranks(size: int, work: Callable[[int, Path], dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """What work(rank, folder) returned in each of `size` processes. work: at the top level of a module."""
    mp.spawn(_rank, (size, work, folder), nprocs=size)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(size)]


def _rank(rank: int, size: int, work: Callable[[int, Path], dict[str, Any]], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    torch.save(work(rank, folder), folder / f"rank-{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads can abort an ordinary exit
