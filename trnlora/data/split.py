"""Which rows are used, and which of them belong to the train, the validation and the test split."""

import functools
import hashlib
import heapq
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trnlora.data.rows import Chunk, Row, chunks, read_jsonl_rows
from trnlora.data.workers import map_in_order, worker_count
from trnlora.errors import UserError

SPLIT_CODES = {"train": 1, "validation": 2, "test": 3}  # what `split_of_line` writes; 0: the line is in no split


@dataclass(frozen=True, slots=True)
class SplitKey:
    """What choosing and splitting need to know of a row. Rows with the same prompt have the same hashes."""

    line: int
    category: str
    split: str | None
    test_hash: bytes
    validation_hash: bytes


def split_key(row: Row, seed: int) -> SplitKey:
    """The split key of a row. The seed goes into its hashes, which decide what is drawn."""
    hashes = (
        hashlib.sha256(json.dumps([f"{seed} {split}", row.instruction, row.context]).encode()).digest()
        for split in ("test", "validation")
    )
    return SplitKey(row.line, row.category, row.split, *hashes)


def read_split_keys(path: Path, seed: int) -> list[SplitKey]:
    """The split keys of all rows of a JSONL file, in its order.

    Raises UserError for the first bad line, for a file without rows and for one where only some rows have a `split`.
    """
    category: dict[str, str] = {}  # one string object for each, however many rows have it
    with map_in_order(functools.partial(_split_keys, path, seed), chunks(path), worker_count(path)) as of_chunks:
        keys = [
            SplitKey(
                key.line, category.setdefault(key.category, key.category), key.split, key.test_hash, key.validation_hash
            )
            for of_chunk in of_chunks
            for key in of_chunk
        ]
    if not keys:
        raise UserError(f"{path} holds no rows")
    without = next((key.line for key in keys if key.split is None), None)
    if without is not None and any(key.split is not None for key in keys):
        raise UserError(f"{path} line {without} has no column 'split', but other lines do: add it to all rows or none")
    return keys


def _split_keys(path: Path, seed: int, chunk: Chunk) -> list[SplitKey]:
    return [split_key(row, seed) for row in read_jsonl_rows(path, chunk)]


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


def split_rows(keys: list[SplitKey], test_fraction: float, validation_fraction: float) -> dict[str, list[SplitKey]]:
    """Rows by split: train, validation, test, each in the order of the file. Raises UserError if one is empty.

    A column `split` decides which rows are test rows; without one, `test_fraction` of the prompts are drawn. Validation
    rows are `validation_fraction` of the remaining prompts. Which rows are drawn depends on their prompts and the seed,
    not on their order. Rows with the same prompt stay together, so that no prompt is both trained on and tested.
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


def split_of_line(splits: dict[str, list[SplitKey]], lines: int) -> bytes:
    """The split of each line of a file, as SPLIT_CODES has it: byte n is that of line n, from 1 to `lines`."""
    codes = bytearray(lines + 1)
    for split, members in splits.items():
        for key in members:
            codes[key.line] = SPLIT_CODES[split]
    return bytes(codes)
