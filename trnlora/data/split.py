"""Which rows are used, and which of them belong to the train, the validation and the test split."""

import bisect
import dataclasses
import functools
import hashlib
import heapq
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trnlora.data.formats import Row
from trnlora.data.rows import Chunk, RowsFile, chunks, read_rows
from trnlora.data.workers import map_in_order, worker_count
from trnlora.errors import UserError

SPLIT_CODES = {"train": 1, "validation": 2, "test": 3}  # what `split_of_row` writes; 0: the row is in no split


@dataclass(frozen=True, slots=True)
class SplitKey:
    """What choosing and splitting need to know of a row.

    test_hash, validation_hash: equal for rows with the same prompt. near_hash: for rows whose prompts differ only in
    white space and case. row_hash: for rows with the same prompt and answer. is_empty: as `Row.is_empty`.
    """

    id: int
    category: str
    split: str | None
    test_hash: bytes
    validation_hash: bytes
    near_hash: bytes
    row_hash: bytes
    is_empty: bool


def split_key(row: Row, seed: int) -> SplitKey:
    """The split key of a row. The seed goes into its hashes, which decide what is drawn."""
    *before, question = row.messages[:-1]
    prompt = json.dumps([question.content, question.context, *(list(message) for message in before)])
    texts = [question.content, question.context, *(text for message in before for text in message)]
    near = json.dumps([" ".join(text.casefold().split()) for text in texts])
    return SplitKey(
        row.id, row.category, row.split, _hash(f"{seed} test", prompt), _hash(f"{seed} validation", prompt),
        _hash("near", near), _hash("row", f"{prompt[:-1]}, {json.dumps(row.messages[-1].content)}]"), row.is_empty,
    )  # fmt: skip


def _hash(salt: str, values: str) -> bytes:
    """The hash of a list in JSON, `values`, with `salt` as a first element before its own."""
    return hashlib.sha256(f'["{salt}", {values[1:]}'.encode()).digest()[:16]


def read_split_keys(files: Sequence[RowsFile], seed: int) -> list[SplitKey]:
    """The split keys of all rows of the files, in their order.

    Raises UserError for the first bad row, and where only some files have a column `split`.
    """
    category: dict[str, str] = {}  # one string object for each, however many rows have it
    tasks = [chunk for file in files for chunk in chunks(file)]
    with map_in_order(functools.partial(_split_keys, seed), tasks, worker_count(files)) as of_chunks:
        keys = [
            dataclasses.replace(key, category=category.setdefault(key.category, key.category))
            for of_chunk in of_chunks
            for key in of_chunk
        ]
    with_split = [file for file in files if "split" in file.format.columns]
    if with_split and len(with_split) < len(files):
        without = next(file for file in files if "split" not in file.format.columns)
        raise UserError(
            f"{without.shown} has no column 'split', but {with_split[0].shown} has: add it to all rows or none"
        )
    return keys


def _split_keys(seed: int, chunk: Chunk) -> list[SplitKey]:
    return [split_key(row, seed) for row in read_rows(chunk)]


def keep_categories(keys: list[SplitKey], categories: list[str] | None) -> list[SplitKey]:
    """The rows of these categories; None keeps all. Raises UserError for a category that no row has."""
    if categories is None:
        return keys
    existing = sorted({key.category for key in keys})
    unknown = sorted(set(categories) - set(existing))
    if unknown or not categories:
        wrong = f"no row has {', '.join(unknown)}" if unknown else "the list is empty; null keeps all"
        raise UserError(f"data.categories: {wrong}; the rows have {', '.join(existing)}")
    return [key for key in keys if key.category in categories]


def without_duplicates(keys: list[SplitKey]) -> list[SplitKey]:
    """The rows without those whose prompt and answer an earlier row has."""
    first: dict[bytes, int] = {}
    return [key for key in keys if first.setdefault(key.row_hash, key.id) == key.id]


def with_near_prompts(keys: list[SplitKey]) -> list[SplitKey]:
    """The rows, with the same hashes where prompts differ only in white space and case.

    They then stay together as rows with the same prompt do. The hashes are the smallest ones of such rows, so that
    others are drawn as if there were none.
    """
    first: dict[bytes, SplitKey] = {}
    smallest: dict[bytes, tuple[bytes, bytes]] = {}
    for key in keys:
        other = first.setdefault(key.near_hash, key)
        if other.test_hash != key.test_hash:
            test, validation = smallest.get(key.near_hash, (other.test_hash, other.validation_hash))
            smallest[key.near_hash] = min(test, key.test_hash), min(validation, key.validation_hash)
    return [
        key if (hashes := smallest.get(key.near_hash)) is None
        else dataclasses.replace(key, test_hash=hashes[0], validation_hash=hashes[1])
        for key in keys
    ]  # fmt: skip


def prompts_of_test_rows(keys: list[SplitKey]) -> dict[int, int]:
    """The rows that a column `split` trains on although a test row has their prompt: ids, each with that row's."""
    test = {key.test_hash: key.id for key in reversed(keys) if key.split == "test"}
    return {key.id: test[key.test_hash] for key in keys if key.split == "train" and key.test_hash in test}


def split_rows(keys: list[SplitKey], test_fraction: float, validation_fraction: float) -> dict[str, list[SplitKey]]:
    """Rows by split: train, validation, test, each in the order of the file. Raises UserError if one is empty.

    A column `split` decides which rows are test rows; without one, `test_fraction` of the prompts are drawn. Validation
    rows are `validation_fraction` of the remaining prompts. Which rows are drawn depends on their prompts and the seed,
    not on their order. Rows with the same hashes stay together, so that no prompt is both trained on and tested.
    """
    splits: dict[str, list[SplitKey]] = {split: [] for split in SPLIT_CODES}
    rest: list[SplitKey] = []
    drawn = _draw((key.test_hash for key in keys), test_fraction) if keys[0].split is None else set()
    for key in keys:
        is_test = key.test_hash in drawn if key.split is None else key.split == "test"
        (splits["test"] if is_test else rest).append(key)
    drawn = _draw((key.validation_hash for key in rest), validation_fraction)
    for key in rest:
        splits["validation" if key.validation_hash in drawn else "train"].append(key)
    for split, members in splits.items():
        if not members:
            raise UserError(
                f"no rows are left for the {split} split (of {len(keys)}): "
                "add rows or change data.categories or the fractions"
            )
    return splits


def _draw(hashes: Iterable[bytes], fraction: float) -> set[bytes]:
    """A fraction of the distinct hashes, at least one: the smallest ones."""
    distinct = set(hashes)
    return set(heapq.nsmallest(max(1, round(fraction * len(distinct))), distinct))


def split_of_row(splits: dict[str, list[SplitKey]], last_id: int) -> bytes:
    """The split of each row, as SPLIT_CODES has it: byte n is that of the row with id n, from 1 to `last_id`."""
    codes = bytearray(last_id + 1)
    for split, members in splits.items():
        for key in members:
            codes[key.id] = SPLIT_CODES[split]
    return bytes(codes)


def copies_of_row(train: list[SplitKey], files: Sequence[RowsFile], last_id: int) -> bytes:
    """How often each training row is used: byte n is that of the row with id n, from 1 to `last_id`.

    A source's `rows` keeps that many of its training rows, and its `weight` uses each so often: 2.5 twice, and half of
    them once more. Which rows are drawn depends on their prompts and the seed. Raises UserError for a weight that uses
    none of a source's rows.
    """
    copies = bytearray(last_id + 1)
    starts = [file.offset for file in files]
    by_source: dict[int, list[SplitKey]] = {}
    for key in train:
        by_source.setdefault(files[bisect.bisect_left(starts, key.id) - 1].source, []).append(key)
    of_source = {file.source: file for file in files}
    for source, members in by_source.items():
        file = of_source[source]
        drawn = members if file.rows is None else heapq.nsmallest(file.rows, members, key=lambda key: key.test_hash)
        if members and not round(file.weight * len(drawn)):
            raise UserError(
                f"data.source: weight {file.weight} of the {len(drawn)} training rows of {file.shown} uses none of "
                "them: raise it, or remove the source"
            )
        whole = int(file.weight)
        more = heapq.nsmallest(round((file.weight - whole) * len(drawn)), drawn, key=lambda key: key.test_hash)
        for members_of_part, times in ((drawn, whole), (more, 1)):
            for key in members_of_part:
                copies[key.id] += times
    return bytes(copies)
