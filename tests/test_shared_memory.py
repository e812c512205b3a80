"""All-reduce in shared memory, by processes."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.ranks import in_ranks

from trnlora.backends import shared_memory
from trnlora.backends.shared_memory import BARRIER_BYTES, MAX_RANKS, SLOT_BYTES, connect

SIZES = [1, 5, 1000, SLOT_BYTES // 4, SLOT_BYTES // 4 + 1, 3 * SLOT_BYTES // 4 + 7]  # of float32
DTYPES = [torch.float32, torch.bfloat16]


def values(rank: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1000 * rank + size)).to(dtype)


def reduce_all(rank: int, folder: Path) -> dict[str, torch.Tensor]:
    shared = connect(dist.group.WORLD)  # type: ignore[arg-type]
    assert shared is not None
    found = {}
    for dtype in DTYPES:
        for op in ("sum", "max"):
            for size in SIZES:
                for _ in range(3):  # slots are used in turn
                    x = values(rank, size, dtype)
                    shared.all_reduce(x, op)
                found[f"{dtype} {op} {size}"] = x
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_has_the_sum_and_the_maximum_in_the_same_bits(tmp_path: Path, ranks: int) -> None:
    found = in_ranks(ranks, reduce_all, tmp_path)
    for dtype in DTYPES:
        for size in SIZES:
            parts = [values(rank, size, dtype) for rank in range(ranks)]
            total = parts[0]
            for part in parts[1:]:
                total = total + part  # in the order of ranks, each sum rounded
            for own in found:
                assert torch.equal(own[f"{dtype} sum {size}"], total)
                assert torch.equal(own[f"{dtype} max {size}"], torch.stack(parts).amax(0))


def only_connect(rank: int, folder: Path) -> dict[str, bool]:
    return {"shared": connect(dist.group.WORLD) is not None}  # type: ignore[arg-type]


def connect_from_elsewhere(rank: int, folder: Path) -> dict[str, bool]:
    if rank == 2:
        shared_memory._open = lambda *place: None
    return only_connect(rank, folder)


def test_if_one_rank_is_elsewhere_all_keep_to_gloo(tmp_path: Path) -> None:
    assert in_ranks(3, connect_from_elsewhere, tmp_path) == [{"shared": False}] * 3


def test_many_ranks_keep_to_gloo(tmp_path: Path) -> None:
    assert in_ranks(MAX_RANKS + 1, only_connect, tmp_path) == [{"shared": False}] * (MAX_RANKS + 1)


def test_only_the_first_ranks_memory_is_taken_for_it() -> None:
    """On another machine, the path may be another process's file, or none."""
    token, other = bytes(64), b"1" * 64
    fd = os.memfd_create("test")
    path = f"/proc/{os.getpid()}/fd/{fd}"
    memory = shared_memory._create(fd, 4096, token, 2)
    taken = shared_memory._open(path, token, 4096)
    assert taken is not None
    taken[-1:] = b"x"
    assert memory[-1:] == b"x"
    assert shared_memory._open(path, other, 4096) is None
    assert shared_memory._open(path, token, 8192) is None
    os.close(fd)
    assert shared_memory._open(path, token, 4096) is None
    assert memory[BARRIER_BYTES : BARRIER_BYTES + len(token)] == token
