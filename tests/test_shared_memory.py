"""All-reduce in shared memory, by processes."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from trnlora.backends import shared_memory
from trnlora.backends.shared_memory import MAX_RANKS, SLOT_BYTES, connect

SIZES = [1, 5, 1000, SLOT_BYTES // 4, SLOT_BYTES // 4 + 1, 3 * SLOT_BYTES // 4 + 7]  # of float32


def values(rank: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1000 * rank + size)).to(dtype)


def in_ranks(size: int, work: str, folder: Path) -> list[dict[str, Any]]:
    """What each of `size` processes saved after it called the function `work` of this module."""
    mp.spawn(_rank, (size, work, str(folder)), nprocs=size)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


def _rank(rank: int, size: int, work: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    torch.save(globals()[work](rank, size), f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads can abort an ordinary exit


def reduce_all(rank: int, size: int) -> dict[str, torch.Tensor]:
    shared = connect(dist.group.WORLD)  # type: ignore[arg-type]
    assert shared is not None
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for op in ("sum", "max"):
            for count in SIZES:
                x = values(rank, count, dtype)
                for _ in range(3):  # slots are used in turn
                    x = values(rank, count, dtype)
                    shared.all_reduce(x, op)
                found[f"{dtype} {op} {count}"] = x
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_has_the_sum_and_the_maximum_in_the_same_bits(tmp_path: Path, size: int) -> None:
    found = in_ranks(size, "reduce_all", tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        for count in SIZES:
            parts = [values(rank, count, dtype) for rank in range(size)]
            total = parts[0]
            for part in parts[1:]:
                total = total + part  # in the order of ranks, each sum rounded
            for rank in range(size):
                assert torch.equal(found[rank][f"{dtype} sum {count}"], total)
                assert torch.equal(found[rank][f"{dtype} max {count}"], torch.stack(parts).amax(0))


def on_two_machines(rank: int, size: int) -> dict[str, bool]:
    if rank == size - 1:  # for the last one, the first one's process is another
        shared_memory._open = lambda path, length, token: real(f"/proc/{os.getpid()}/fd/0", length, token)
        real = _OPEN
    return {"shared": connect(dist.group.WORLD) is not None}  # type: ignore[arg-type]


_OPEN = shared_memory._open


def test_without_a_machine_in_common_all_ranks_keep_to_gloo(tmp_path: Path) -> None:
    assert in_ranks(3, "on_two_machines", tmp_path) == [{"shared": False}] * 3


def only_connect(rank: int, size: int) -> dict[str, bool]:
    return {"shared": connect(dist.group.WORLD) is not None}  # type: ignore[arg-type]


def test_many_ranks_keep_to_gloo(tmp_path: Path) -> None:
    size = MAX_RANKS + 1
    assert in_ranks(size, "only_connect", tmp_path) == [{"shared": False}] * size
