"""All-reduce in shared memory, for the few ranks of one machine that train on its processor.

gloo sends what ranks of one machine add up through sockets, in several steps, each of which waits for the scheduler.
Here every rank copies its values into memory that all map, waits for the others once, and adds up all of them. The
order of the sum is that of the ranks, so all get the same bits.
"""

import ctypes
import mmap
import os
import secrets
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MAX_RANKS = 8  # each rank reads the values of all
SLOT_BYTES = 2**21  # larger tensors are reduced in parts
BARRIER_BYTES = 64  # for a pthread_barrier_t, which has 32 in glibc
TOKEN_BYTES = 64
HEADER_BYTES = BARRIER_BYTES + TOKEN_BYTES
PTHREAD_PROCESS_SHARED = 1  # <pthread.h>


class SharedMemory:
    """Memory that the ranks of a group on one machine have mapped: two slots for each rank, used in turn.

    So a rank may write its next values while others still read the last ones. If a rank ends, the others wait until the
    launcher ends them too.
    """

    def __init__(self, memory: mmap.mmap, rank: int, size: int):
        self.rank = rank
        bytes_ = torch.frombuffer(memory, dtype=torch.uint8)
        self._slots = bytes_[HEADER_BYTES:].view(2, size, SLOT_BYTES)
        self._turn = 0
        self._barrier = ctypes.c_void_p(bytes_.data_ptr())
        self._wait = ctypes.CDLL(None).pthread_barrier_wait  # gives up the GIL and sleeps

    def all_reduce(self, x: Tensor, op: str) -> None:
        """Make a contiguous `x`, in place, the sum or the maximum ("sum", "max") over the ranks."""
        combine = torch.add if op == "sum" else torch.maximum
        for part in x.view(-1).split(SLOT_BYTES // x.itemsize):
            slots = self._slots[self._turn, :, : part.nbytes].view(x.dtype)
            self._turn = 1 - self._turn
            slots[self.rank].copy_(part)
            self._wait(self._barrier)
            combine(slots[0], slots[1], out=part)
            for slot in slots[2:]:
                combine(part, slot, out=part)


def connect(group: dist.ProcessGroup) -> SharedMemory | None:
    """Memory shared by the ranks of `group`, or None if they are too many or not all on this machine. Call on all."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if size == 1 or size > MAX_RANKS or not hasattr(os, "memfd_create"):
        return None
    length = HEADER_BYTES + 2 * size * SLOT_BYTES
    token = secrets.token_bytes(TOKEN_BYTES)
    # Not in /dev/shm, which may be small. It is freed with the last process that has mapped it.
    fd = os.memfd_create("trnlora-all-reduce") if rank == 0 else -1
    memory = _create(fd, length, token, size) if rank == 0 else None
    place: list[Any] = [f"/proc/{os.getpid()}/fd/{fd}", token]
    dist.broadcast_object_list(place, group=group, group_src=0)
    path, token = place
    if rank > 0:
        memory = _open(path, token, length)
    found: list[Any] = [None] * size
    dist.all_gather_object(found, memory is not None, group=group)
    if rank == 0:
        os.close(fd)
    return SharedMemory(memory, rank, size) if memory and all(found) else None


def _create(fd: int, length: int, token: bytes, ranks: int) -> mmap.mmap:
    """The first rank's memory, with a barrier for so many ranks."""
    os.ftruncate(fd, length)
    memory = mmap.mmap(fd, length)
    memory[BARRIER_BYTES:HEADER_BYTES] = token
    libc = ctypes.CDLL(None)
    attributes = ctypes.create_string_buffer(BARRIER_BYTES)  # for a pthread_barrierattr_t, which is smaller
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc.pthread_barrierattr_init(attributes)
    libc.pthread_barrierattr_setpshared(attributes, PTHREAD_PROCESS_SHARED)
    if error := libc.pthread_barrier_init(ctypes.c_void_p(address), attributes, ranks):
        raise OSError(error, os.strerror(error))
    return memory


def _open(path: str, token: bytes, length: int) -> mmap.mmap | None:
    """The first rank's memory; None if that process is not on this machine, where `path` may be something else."""
    try:
        fd = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        memory = mmap.mmap(fd, length) if os.fstat(fd).st_size == length else None
    finally:
        os.close(fd)
    return memory if memory and memory[BARRIER_BYTES:HEADER_BYTES] == token else None
