"""Packing documents into rows of seq_len tokens, and the Parquet files of packed rows.

A document is an encoded row of the data set.
"""

import heapq
import itertools
import os
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trnlora.files import atomic_file

IGNORED = -100  # the label of tokens that are not trained on: the default ignore_index of torch and HF

GROUP_TOKENS = 4 << 20  # of a Parquet file's row group, which is held in memory as a whole


def with_labels(tokens: Iterable[int], labelled: Iterable[tuple[int, int]]) -> np.ndarray:
    """Token ids in which those that are trained on stand as their bitwise complement, a negative number: int32.

    labelled: spans (start, end) of `tokens`.
    """
    marked = np.fromiter(tokens, np.int32)
    for start, end in labelled:
        marked[start:end] = ~marked[start:end]
    return marked


class Document(NamedTuple):
    """A document: the id of its row, and its tokens as `with_labels` has them."""

    id: int
    tokens: np.ndarray  # int32


@dataclass
class DocumentStore(Sequence[Document]):
    """The documents of a split, which may be larger than the memory.

    Their lengths are in memory, their token ids in a temporary file in `folder` that is deleted with this object.
    Documents are added first, then read: `finish` is called in between.
    """

    folder: Path
    _added: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115  # open as long as this object lives
        self._table = np.empty((0, 3), np.int32)
        self._starts = np.zeros(1, np.int64)

    def add(self, documents: np.ndarray, tokens: np.ndarray) -> None:
        """Append documents.

        documents: (n, 3) int32, of each the row's id, the number of tokens, and that of tokens with a label. tokens:
        int32, their tokens end to end, as `with_labels` has them.
        """
        self._added.append(documents)
        tokens.tofile(self._file)

    def finish(self) -> None:
        """Make the documents that were added readable."""
        self._file.flush()
        self._table = np.concatenate([self._table, *self._added])
        self._added.clear()
        self._starts = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])

    @property
    def ids(self) -> np.ndarray:
        """The id of each document's row: (documents,) int32."""
        return self._table[:, 0]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document: (documents,) int32."""
        return self._table[:, 1]

    @property
    def labelled(self) -> np.ndarray:
        """Tokens with a label of each document: (documents,) int32."""
        return self._table[:, 2]

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, number: int) -> Document:  # type: ignore[override]
        id, length, _ = (int(value) for value in self._table[number])
        # Read, not mapped: mapped pages would count as memory of this process.
        read = os.pread(self._file.fileno(), 4 * length, 4 * int(self._starts[number]))
        return Document(id, np.frombuffer(read, np.int32))


def assign(lengths: Sequence[int] | np.ndarray, seq_len: int, seed: int) -> list[list[int]]:
    """Decide which documents share a packed row: best fit in a shuffled order. Document numbers by packed row.

    lengths: tokens of each document, all from 1 to seq_len. Best fit is

        for each document:
            fitting = the packed rows with at least as many tokens left as the document has
            append it to the one of `fitting` with the fewest tokens left (the first of several), or else to a new row

    The order is shuffled and not sorted by length: sorting would pack a little tighter, but it would gather documents
    of one length, and so often of one category, in one training step.
    """
    order = random.Random(seed).sample(range(len(lengths)), len(lengths))
    packed: list[list[int]] = []
    open_rows = _OpenRows(seq_len)
    for document in order:
        length = int(lengths[document])
        room = smallest_room(open_rows.rooms, length)
        if room is None:
            room, number = seq_len, len(packed)
            packed.append([])
        else:
            number = open_rows.take_first(room)
        packed[number].append(document)
        if room > length:
            open_rows.add(number, room - length)
    return packed


class _OpenRows:
    """The packed rows that are not full, by their room: the number of tokens left in them."""

    def __init__(self, seq_len: int) -> None:
        self._numbers: list[list[int]] = [[] for _ in range(seq_len + 1)]  # by room, each list a heap
        self.rooms = 0  # bit n is set while a row has room n

    def add(self, number: int, room: int) -> None:
        heapq.heappush(self._numbers[room], number)
        self.rooms |= 1 << room

    def take_first(self, room: int) -> int:
        """Remove the first of the rows with this room and return its number."""
        number = heapq.heappop(self._numbers[room])
        if not self._numbers[room]:
            self.rooms &= ~(1 << room)
        return number


def smallest_room(rooms: int, at_least: int) -> int | None:
    """The smallest of `rooms` that is not below `at_least`, or None. `rooms` is a bit set: bit n stands for n."""
    enough = rooms >> at_least
    lowest_bit = enough & -enough
    return at_least + lowest_bit.bit_length() - 1 if enough else None


def packed_row(documents: Sequence[Document], seq_len: int, pad_token_id: int) -> dict[str, np.ndarray]:
    """Lay documents into one row: four int32 arrays of `seq_len`, and `row_ids`, the ids of the documents' rows.

    input_ids; labels (aligned with input_ids as HF has them, IGNORED where nothing is trained on); position_ids, which
    restart at 0 in each document; document_ids, 1, 2, … and 0 for padding. Each document begins with tokens without
    labels, so the shifted loss never asks one document to predict the next.
    """
    fill = {"input_ids": pad_token_id, "labels": IGNORED, "position_ids": 0, "document_ids": 0}
    row = {column: np.full(seq_len, value, np.int32) for column, value in fill.items()}
    start = 0
    for number, document in enumerate(documents, 1):
        tokens = document.tokens
        end = start + len(tokens)
        row["input_ids"][start:end] = np.where(tokens < 0, ~tokens, tokens)
        row["labels"][start:end] = np.where(tokens < 0, ~tokens, IGNORED)
        row["position_ids"][start:end] = np.arange(len(tokens))
        row["document_ids"][start:end] = number
        start = end
    return row | {"row_ids": np.array([document.id for document in documents], np.int32)}


def pack(
    documents: Sequence[Document],
    numbers: Sequence[int] | np.ndarray,
    lengths: Sequence[int] | np.ndarray,
    seq_len: int,
    pad_token_id: int,
    packing: bool,
    seed: int,
) -> Iterator[dict[str, np.ndarray]]:
    """All packed rows, one by one; without `packing`, one document per row in the order of the file.

    numbers: which of `documents` to pack, some perhaps more than once. lengths: the tokens of each of these.
    """
    assigned = assign(lengths, seq_len, seed) if packing else [[place] for place in range(len(lengths))]
    for places in assigned:
        yield packed_row([documents[int(numbers[place])] for place in places], seq_len, pad_token_id)


def write_parquet(path: Path, packed: Iterable[dict[str, Any]]) -> int:
    """Write packed rows, at least one, and return their number.

    The columns input_ids, labels, position_ids and document_ids are list<int32> of seq_len values, row_ids is a
    list<int32> of one value per document.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, writer = iter(packed), None
    written = 0
    with atomic_file(path) as partial:
        while group := list(itertools.islice(rows, 1)):
            group += itertools.islice(rows, max(0, GROUP_TOKENS // len(group[0]["input_ids"]) - 1))
            table = pa.table({column: _list_column([row[column] for row in group]) for column in group[0]})
            if writer is None:
                writer = pq.ParquetWriter(partial, table.schema, compression="zstd")
            writer.write_table(table)
            written += len(group)
        assert writer is not None, "there are no packed rows"
        writer.close()
    return written


def _list_column(values: list[Any]) -> Any:
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum([len(row) for row in values])])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(np.concatenate(values).astype(np.int32)))
