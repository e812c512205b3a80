"""Move a model between its HF tensors and NxD's shards, a block of rows at a time, in either direction.

A block of an HF tensor is read once and written to every rank that holds part of it (or filled from the ranks and
written once), so memory is THREADS × buffer_bytes whatever the model's size, and each byte is moved as often as a plain
copy moves it.
"""

import dataclasses
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from trnlora.errors import UserError
from trnlora.model.config import ModelConfig
from trnlora.params import Convert
from trnlora.weights.nxd_layout import Slice
from trnlora.weights.storage import StoredTensor

THREADS = 8  # more than cores: most of them wait for the disk at any moment


@dataclasses.dataclass(frozen=True)
class RankSlice:
    """A slice of an HF tensor within a rank's tensor, where it begins at row `start`."""

    tensor: StoredTensor
    slice: Slice
    start: int


def slices_of_hf_tensors(
    tables: Sequence[Mapping[str, list[Slice]]], ranks: Sequence[Mapping[str, StoredTensor]]
) -> dict[str, list[RankSlice]]:
    """Every rank's slices of each HF tensor. tables: `trnlora.weights.nxd_layout.shard_slices` of each rank."""
    parts: dict[str, list[RankSlice]] = defaultdict(list)
    for table, tensors in zip(tables, ranks, strict=True):
        for name, slices in table.items():
            assert len(slices) == 1 or slices[0].dim == 0, "a rank's columns are one slice: its heads are adjacent"
            start = 0
            for cut in slices:
                parts[cut.hf_key].append(RankSlice(tensors[name], cut, start))
                start += cut.stop - cut.start
    return dict(parts)


def scatter(block: np.ndarray, first: int, parts: Sequence[RankSlice]) -> int:
    """Write the block, which begins at row `first` of an HF tensor, to every rank that holds part of it.

    Returns the number of bytes written.
    """
    written = 0
    for part in parts:
        mine, rows = _overlap(block, first, part)
        if mine.size:
            part.tensor.write_rows(rows, mine)
            written += mine.size
    return written


def gather(block: np.ndarray, first: int, parts: Sequence[RankSlice]) -> None:
    """Fill the block (uint8), which begins at row `first` of an HF tensor, from the ranks.

    Raises UserError where ranks that hold copies of the same rows (KV heads, norms) differ.
    """
    filled = np.zeros(len(block), dtype=bool)
    for part in parts:
        mine, rows = _overlap(block, first, part)
        if not mine.size:
            continue
        found = part.tensor.read_rows(rows, rows + len(mine))
        if part.slice.dim == 1:  # columns: no two ranks hold the same
            mine[:] = found
            continue
        begin = max(part.slice.start - first, 0)
        known = filled[begin : begin + len(mine)]
        if not np.array_equal(mine[known], found[known]):
            raise UserError(f"ranks hold different copies of {part.slice.hf_key}: the shards are of different models")
        mine[:] = found
        known[:] = True


def _overlap(block: np.ndarray, first: int, part: RankSlice) -> tuple[np.ndarray, int]:
    """The view of the block (rows, bytes) that the part holds, and its first row within the rank's tensor."""
    cut = part.slice
    if cut.dim == 1:
        item = part.tensor.row_bytes // (cut.stop - cut.start)
        return block[:, cut.start * item : cut.stop * item], first
    if cut.dim is None:
        return block, first
    low, high = max(first, cut.start), min(first + len(block), cut.stop)
    return block[max(0, low - first) : max(0, high - first)], part.start + low - cut.start


def each_block(
    tensors: Mapping[str, StoredTensor],
    work: Callable[[str, StoredTensor, int, np.ndarray], int],
    buffer_bytes: int,
) -> Iterator[int]:
    """Call work(name, tensor, first row, block) for blocks of at most `buffer_bytes`, in THREADS threads.

    block: a uint8 buffer (rows, row_bytes) that is reused and not cleared: fresh memory for each block would cost as
    much time as copying it, because the kernel zeroes it. Yields what each call returns. (Reading, writing and copying
    bytes release the GIL.)
    """
    own = threading.local()

    def run(name: str, tensor: StoredTensor, first: int, end: int) -> int:
        size = (end - first) * tensor.row_bytes
        if not hasattr(own, "buffer") or own.buffer.size < size:
            own.buffer = np.empty(max(size, buffer_bytes), dtype=np.uint8)
        return work(name, tensor, first, own.buffer[:size].reshape(end - first, tensor.row_bytes))

    with ThreadPoolExecutor(THREADS) as pool:
        jobs = []
        for name, tensor in tensors.items():
            rows = max(1, buffer_bytes // tensor.row_bytes)
            for first in range(0, tensor.rows, rows):
                jobs.append(pool.submit(run, name, tensor, first, min(first + rows, tensor.rows)))
        try:
            for job in jobs:
                yield job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def kv_order(ranks: Sequence[Mapping[str, StoredTensor]], config: ModelConfig, convert: Convert) -> str:
    """Whether the KV heads of these shards are in trn1's or trn2's order, from which ranks hold equal keys.

    Returns convert.hw_backend where that does not tell (no copies, or all heads equal).
    """
    kv_heads, repeat = config.num_key_value_heads, convert.kv_size_multiplier
    if repeat == 1 or kv_heads == 1 or kv_heads * repeat != convert.tp_size:
        return convert.hw_backend
    key = "model.layers.0.self_attn.qkv_proj.weight_k"
    keys = [rank[key].read_rows(0, config.head_dim) for rank in ranks]
    adjacent = all(np.array_equal(keys[rank], keys[rank - rank % repeat]) for rank in range(convert.tp_size))
    rounds = all(np.array_equal(keys[rank], keys[rank % kv_heads]) for rank in range(convert.tp_size))
    if adjacent == rounds:
        return convert.hw_backend
    return "trn2" if adjacent else "trn1"
