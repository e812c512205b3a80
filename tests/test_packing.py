"""Packing documents into rows, and the temporary file that holds the documents."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trnlora.data.packing import IGNORED, Document, DocumentStore, assign, pack, smallest_room, with_labels

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


def packed_rows(documents: list[Document], *options: Any) -> list[dict[str, list[int]]]:
    rows = pack(documents, range(len(documents)), [len(one.tokens) for one in documents], *options)
    return [{column: values.tolist() for column, values in packed.items()} for packed in rows]


def document(tokens: Iterator[int], prompt: int, response: int) -> Document:
    ids = [next(tokens) for _ in range(prompt + response)]
    return Document(1, with_labels(ids, [(prompt, prompt + response)]))


def unlabelled(document: Document) -> list[int]:
    return np.where(document.tokens < 0, ~document.tokens, document.tokens).tolist()


@given(PACKABLE, st.booleans(), st.integers(0, 3))
def test_packing_keeps_every_document_whole(sizes: tuple[int, list[tuple[int, int]]], packing: bool, seed: int) -> None:
    seq_len, lengths = sizes
    pad = 0
    tokens = iter(range(1, 10_000))  # every token occurs once, so any token identifies its document
    documents = [document(tokens, prompt, response) for prompt, response in lengths]
    found = []
    packed = packed_rows(documents, seq_len, pad, packing, seed)
    for row in packed:
        one = dict(row)
        assert list(one) == ["input_ids", "labels", "position_ids", "document_ids", "row_ids"]
        assert len(one.pop("row_ids")) == max(one["document_ids"])
        assert all(len(values) == seq_len for values in one.values())
        columns = list(zip(*one.values(), strict=True))
        count = max(one["document_ids"])
        assert one["document_ids"] == sorted(one["document_ids"], key=lambda number: number or seq_len + 1)
        for number in range(1, count + 1):
            its = [column for column in columns if column[3] == number]
            ids, labels, positions = ([column[i] for column in its] for i in range(3))
            [source] = [each for each in documents if each.tokens[0] == ids[0]]
            assert ids == unlabelled(source)
            assert labels == [
                id if token < 0 else IGNORED for id, token in zip(ids, source.tokens.tolist(), strict=True)
            ]
            assert positions == list(range(len(ids)))
            found.append(ids[0])
        assert all(column == (pad, IGNORED, 0, 0) for column in columns if column[3] == 0)
    assert sorted(found) == [each.tokens[0] for each in documents]
    if packing:
        # Best fit starts a row only for a document that fits no open row, so no two rows would fit into one.
        free = sorted(one["document_ids"].count(0) for one in packed)
        assert len(free) == 1 or free[-1] + free[-2] < seq_len
        assert packed == packed_rows(documents, seq_len, pad, packing, seed)
    else:
        assert found == [each.tokens[0] for each in documents]


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
    store.add(np.array([[1, 3, 1], [4, 4, 3]], np.int32), with_labels(range(7), [(2, 3), (4, 7)]))
    store.add(np.empty((0, 3), np.int32), np.empty(0, np.int32))
    store.add(np.array([[9, 2, 1]], np.int32), with_labels(range(7, 9), [(1, 2)]))
    store.finish()
    found = [(store[n].id, store[n].tokens.tolist()) for n in range(len(store))]
    assert found == [(1, [0, 1, ~2]), (4, [3, ~4, ~5, ~6]), (9, [7, ~8])]
    assert store.lengths.tolist() == [3, 4, 2]
    assert store.labelled.tolist() == [1, 3, 1]
    assert list(tmp_path.iterdir()) == []  # the file has no name, so a killed process leaves nothing behind
