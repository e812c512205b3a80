"""Packing documents into rows, and the temporary file that holds the documents."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trnlora.data.encode import Example
from trnlora.data.packing import IGNORED, DocumentStore, assign, pack, smallest_room
from trnlora.data.rows import Row

PACKABLE = st.integers(2, 40).flatmap(
    lambda seq_len: st.tuples(
        st.just(seq_len),
        st.lists(
            st.integers(2, seq_len).flatmap(
                lambda total: st.integers(1, total - 1).map(lambda prompt: (prompt, total - prompt))
            ),
            min_size=1,
            max_size=40,
        ),
    )
)


def packed_rows(examples: list[Example], *options: Any) -> list[dict[str, list[int]]]:
    rows = pack(examples, [len(one) for one in examples], *options)
    return [{column: values.tolist() for column, values in packed.items()} for packed in rows]


def example(tokens: Iterator[int], prompt: int, response: int) -> Example:
    prompt_ids, response_ids = [next(tokens) for _ in range(prompt)], [next(tokens) for _ in range(response)]
    return Example(Row(1, "Say it.", "", "it", "talk", None), "", prompt_ids, response_ids)


@given(PACKABLE, st.booleans(), st.integers(0, 3))
def test_packing_keeps_every_document_whole(sizes: tuple[int, list[tuple[int, int]]], packing: bool, seed: int) -> None:
    seq_len, lengths = sizes
    pad = 0
    tokens = iter(range(1, 10_000))  # every token occurs once, so any token identifies its document
    examples = [example(tokens, prompt, response) for prompt, response in lengths]
    found = []
    packed = packed_rows(examples, seq_len, pad, packing, seed)
    for row in packed:
        one = dict(row)
        assert list(one) == ["input_ids", "labels", "position_ids", "document_ids", "row_ids"]
        assert len(one.pop("row_ids")) == max(one["document_ids"])
        assert all(len(values) == seq_len for values in one.values())
        columns = list(zip(*one.values(), strict=True))
        documents = max(one["document_ids"])
        assert one["document_ids"] == sorted(one["document_ids"], key=lambda number: number or seq_len + 1)
        for number in range(1, documents + 1):
            document = [column for column in columns if column[3] == number]
            ids, labels, positions = ([column[i] for column in document] for i in range(3))
            [source] = [e for e in examples if e.prompt_ids[0] == ids[0]]
            assert ids == source.prompt_ids + source.response_ids
            assert labels == [IGNORED] * len(source.prompt_ids) + source.response_ids
            assert positions == list(range(len(ids)))
            found.append(ids[0])
        assert all(column == (pad, IGNORED, 0, 0) for column in columns if column[3] == 0)
    assert sorted(found) == [e.prompt_ids[0] for e in examples]
    if packing:
        # Best fit starts a row only for a document that fits no open row, so no two rows would fit into one.
        free = sorted(one["document_ids"].count(0) for one in packed)
        assert len(free) == 1 or free[-1] + free[-2] < seq_len
        assert packed == packed_rows(examples, seq_len, pad, packing, seed)
    else:
        assert found == [e.prompt_ids[0] for e in examples]


def test_packed_rows_mix_documents_of_all_lengths() -> None:
    """If sorted by length, all rows but one would hold a single length. In the seeded order, most hold both."""
    lengths = [10] * 100 + [50] * 100
    packed = assign(lengths, 300, 17)
    assert sum(len({lengths[document] for document in documents}) == 2 for documents in packed) > len(packed) / 2
    assert assign(lengths, 300, 18) != packed


def test_assign_is_best_fit() -> None:
    """`assign` gives the same as a direct implementation of the algorithm in its docstring."""
    lengths = random.Random(3).choices(range(1, 65), k=400)
    rows: list[list[int]] = []
    for document in random.Random(17).sample(range(400), 400):
        room = [64 - sum(lengths[member] for member in row) for row in rows]
        fitting = [(left, number) for number, left in enumerate(room) if left >= lengths[document]]
        if fitting:
            rows[min(fitting)[1]].append(document)
        else:
            rows.append([document])
    assert assign(lengths, 64, 17) == rows


@pytest.mark.parametrize(("at_least", "room"), [(1, 3), (3, 3), (4, 64), (64, 64), (65, None)])
def test_smallest_room(at_least: int, room: int | None) -> None:
    assert smallest_room(1 << 3 | 1 << 64, at_least) == room
    assert smallest_room(0, at_least) is None


def test_a_document_store_returns_what_was_added(tmp_path: Path) -> None:
    store = DocumentStore(tmp_path)
    store.add(np.array([[1, 2, 1], [4, 1, 3]], np.int32), np.arange(7, dtype=np.int32))
    store.add(np.empty((0, 3), np.int32), np.empty(0, np.int32))
    store.add(np.array([[9, 1, 1]], np.int32), np.arange(7, 9, dtype=np.int32))
    store.finish()
    found = [(store[n].line, store[n].prompt_ids.tolist(), store[n].response_ids.tolist()) for n in range(len(store))]
    assert found == [(1, [0, 1], [2]), (4, [3], [4, 5, 6]), (9, [7], [8])]
    assert store.lengths.tolist() == [3, 4, 2]
    assert store.labelled_tokens == 5
    assert list(tmp_path.iterdir()) == []  # the file has no name, so a killed process leaves nothing behind
