"""Move a model between its HF tensors and NxD's shards, a block of rows at a time, in either direction.

A block of an HF tensor is read once and written to every rank that holds part of it (or filled from the ranks and
written once), so memory is THREADS × buffer_bytes whatever the model, and each byte is touched as a copy would.
"""

import dataclasses
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from trnlora.architecture import LlamaConfig
from trnlora.checkpoint import StoredTensor
from trnlora.errors import UserError
from trnlora.layout import Piece
from trnlora.params import Convert

THREADS = 8  # more than cores: at any moment most of them wait for the disk


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of an HF tensor within a rank's tensor, where it begins at row `start`."""

    tensor: StoredTensor
    piece: Piece
    start: int


def parts_of_hf_tensors(
    tables: Sequence[Mapping[str, list[Piece]]], ranks: Sequence[Mapping[str, StoredTensor]]
) -> dict[str, list[Part]]:
    """Every rank's parts of each HF tensor. tables: `trnlora.layout.shard_pieces` of each rank."""
    parts: dict[str, list[Part]] = defaultdict(list)
    for table, tensors in zip(tables, ranks, strict=True):
        for name, pieces in table.items():
            assert len(pieces) == 1 or pieces[0].dim == 0, "a rank's columns are one piece: its heads are neighbours"
            start = 0
            for piece in pieces:
                parts[piece.hf_key].append(Part(tensors[name], piece, start))
                start += piece.stop - piece.start
    return dict(parts)


def scatter(block: np.ndarray, first: int, parts: Sequence[Part]) -> int:
    """Write rows `first`… of an HF tensor to every rank that holds them; the number of bytes written."""
    written = 0
    for part in parts:
        mine, rows = _overlap(block, first, part)
        if mine.size:
            part.tensor.write_rows(rows, mine)
            written += mine.size
    return written


def gather(block: np.ndarray, first: int, parts: Sequence[Part]) -> None:
    """Fill rows `first`… of an HF tensor (uint8) from the ranks.

    Raises UserError where ranks that hold copies of the same rows (KV heads, norms) differ.
    """
    filled = np.zeros(len(block), dtype=bool)
    for part in parts:
        mine, rows = _overlap(block, first, part)
        if not mine.size:
            continue
        found = part.tensor.read_rows(rows, rows + len(mine))
        if part.piece.dim == 1:  # columns: no two ranks hold the same
            mine[:] = found
            continue
        begin = max(part.piece.start - first, 0)
        known = filled[begin : begin + len(mine)]
        if not np.array_equal(mine[known], found[known]):
            raise UserError(f"ranks hold different copies of {part.piece.hf_key}: the shards are not of one model")
        mine[:] = found
        known[:] = True


def _overlap(block: np.ndarray, first: int, part: Part) -> tuple[np.ndarray, int]:
    """The view of the block (rows, bytes) that the part holds, and its first row within the rank's tensor."""
    piece = part.piece
    if piece.dim == 1:
        item = part.tensor.row_bytes // (piece.stop - piece.start)
        return block[:, piece.start * item : piece.stop * item], first
    if piece.dim is None:
        return block, first
    low, high = max(first, piece.start), min(first + len(block), piece.stop)
    return block[max(0, low - first) : max(0, high - first)], part.start + low - piece.start


def each_block(
    tensors: Mapping[str, StoredTensor],
    work: Callable[[str, StoredTensor, int, np.ndarray], int],
    buffer_bytes: int,
) -> Iterator[int]:
    """Call work(name, tensor, first row, block) for blocks of at most `buffer_bytes`, in THREADS threads.

    block: uint8 (rows, row_bytes) to work in, with what an earlier call left in it: fresh memory for each block would
    cost as much time as a copy of it, for the kernel clears it. Yields what each call returns. (Reading, writing and
    copying bytes release Python's lock.)
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


def kv_order(ranks: Sequence[Mapping[str, StoredTensor]], model: LlamaConfig, convert: Convert) -> str:
    """Whose order the KV heads of these shards are in, trn1's or trn2's, told by which ranks hold equal keys.

    Where it cannot be told (no copies, or all heads alike) it is what `convert` says.
    """
    kv_heads, repeat = model.num_key_value_heads, convert.kv_size_multiplier
    if repeat == 1 or kv_heads == 1 or kv_heads * repeat != convert.tp_size:
        return convert.hw_backend
    keys = [rank["model.layers.0.self_attn.qkv_proj.weight_k"].read_rows(0, model.head_dim) for rank in ranks]
    neighbours = all(np.array_equal(keys[rank], keys[rank - rank % repeat]) for rank in range(convert.tp_size))
    rounds = all(np.array_equal(keys[rank], keys[rank % kv_heads]) for rank in range(convert.tp_size))
    if neighbours == rounds:
        return convert.hw_backend
    return "trn2" if neighbours else "trn1"
