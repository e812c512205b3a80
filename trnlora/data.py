"""From a file of rows to packed training rows: reading, splitting, tokenizing, packing.

The order of the functions is the order in which stages/prepare_data.py calls them. Everything is a function of the
file and the params: two runs write the same bytes.
"""

import bisect
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trnlora import templates
from trnlora.errors import UserError
from trnlora.files import atomic_file, parse_json, sha256
from trnlora.sources import hub_snapshot, parse_source

IGNORED = -100  # the label where nothing is to be learnt: torch's and HF's default ignore_index

COLUMNS = ("instruction", "context", "response", "category")
SPLITS = ("train", "test")  # what a column `split` may hold; validation rows are always drawn from the train rows


@dataclass(frozen=True)
class Row:
    """One row of the source, stripped of outer white space. `id` is its line in the file, from 1."""

    id: int
    instruction: str
    context: str  # may be empty
    response: str
    category: str
    split: str | None  # train | test, or None when the file has no such column


@dataclass(frozen=True)
class Example:
    """A row rendered and tokenized. `response_ids` are the labelled tokens: EOS is the last unless it was truncated."""

    row: Row
    prompt: str
    prompt_ids: list[int]
    response_ids: list[int]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass
class Overlong:
    """How many rows did not fit seq_len, by what was done with them."""

    dropped: int = 0
    truncated: int = 0


# Reading ------------------------------------------------------------------------------------------------------------


def fetch(uri: str, pinned_sha256: str | None) -> Path:
    """The JSONL file that a `data.source` names, downloaded where it is on the hub.

    Raises UserError where it cannot be had or its sha256 is not the pinned one.
    """
    source = parse_source(uri)
    if source.scheme == "hf":
        files = sorted(hub_snapshot(source, ["*.jsonl"], repo_type="dataset").rglob("*.jsonl"))
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "none"
            raise UserError(f"{uri} must hold one .jsonl file, it holds {names}: fetch one yourself and use path://")
        path = files[0]
    else:
        path = source.path
        if not path.is_file():
            raise UserError(f"data.source: {path} is not a file; path:// is relative to {Path.cwd()}")
    if pinned_sha256 is not None and (actual := sha256(path)) != pinned_sha256:
        raise UserError(f"{path} has sha256 {actual}, but data.sha256 pins {pinned_sha256}: the file has changed")
    return path


def read_rows(path: Path) -> list[Row]:
    """Read and check a JSONL file of rows. Raises UserError naming the file and the line of the first bad one."""
    rows = []
    # Lines are split as bytes: str.splitlines would also split at U+2028 and its like inside a string.
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark that some editors write
            if line := line.strip():
                rows.append(_parse(line, number, f"{path} line {number}"))
    if not rows:
        raise UserError(f"{path} holds no rows")
    without = [row.id for row in rows if row.split is None]
    if without and len(without) < len(rows):
        raise UserError(f"{path} line {without[0]} has no column 'split', but other lines do: give it to all or none")
    return rows


def _parse(line: bytes, number: int, where: str) -> Row:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not valid UTF-8 ({error.reason} at byte {error.start})") from None
    values = parse_json(text, where)
    if not isinstance(values, dict):
        raise UserError(f"{where} is not a JSON object with the columns {', '.join(COLUMNS)}")
    for column in COLUMNS:
        if column not in values:
            raise UserError(f"{where} has no column {column!r} (wanted: {', '.join(COLUMNS)})")
        value = values[column]
        if not isinstance(value, str):
            raise UserError(f"{where}: {column} must be a string, it is {json.dumps(value)[:60]}")
        if column != "context" and not value.strip():
            raise UserError(f"{where}: {column} is empty")
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            raise UserError(f"{where}: {column} holds half of a surrogate pair, which no tokenizer takes")
    split = values.get("split")
    if "split" in values and split not in SPLITS:
        raise UserError(f"{where}: split must be train or test, it is {json.dumps(split)[:60]}")
    return Row(number, **{column: values[column].strip() for column in COLUMNS}, split=split)


# Choosing and splitting ---------------------------------------------------------------------------------------------


def keep_categories(rows: list[Row], categories: list[str] | None) -> list[Row]:
    """The rows of these categories; None keeps all. Raises UserError for a category that no row has."""
    if categories is None:
        return rows
    existing = sorted({row.category for row in rows})
    unknown = sorted(set(categories) - set(existing))
    if unknown or not categories:
        wrong = f"no row has {', '.join(unknown)}" if unknown else "the list is empty; null keeps all"
        raise UserError(f"data.categories: {wrong}; the rows have {', '.join(existing)}")
    return [row for row in rows if row.category in categories]


def split_rows(rows: list[Row], test_fraction: float, validation_fraction: float, seed: int) -> dict[str, list[Row]]:
    """Rows by split: train, validation, test, each in the order of the file. Raises UserError when one is empty.

    A column `split` decides what is a test row; without one, `test_fraction` of the rows are drawn. Validation rows
    are `validation_fraction` of the rest. Which rows are drawn depends on their prompts and the seed, not on their
    order, and rows with the same prompt stay together, so that no prompt is both learnt and tested.
    """
    if rows[0].split is None:
        test_prompts = _draw(rows, test_fraction, f"{seed} test")
        is_test = [_prompt(row) in test_prompts for row in rows]
    else:
        is_test = [row.split == "test" for row in rows]
    rest = [row for row, test in zip(rows, is_test, strict=True) if not test]
    validation_prompts = _draw(rest, validation_fraction, f"{seed} validation")
    splits = {
        "train": [row for row in rest if _prompt(row) not in validation_prompts],
        "validation": [row for row in rest if _prompt(row) in validation_prompts],
        "test": [row for row, test in zip(rows, is_test, strict=True) if test],
    }
    for name, members in splits.items():
        if not members:
            raise UserError(f"{len(rows)} rows leave none for {name}: add rows or change data.categories or fractions")
    return splits


def _prompt(row: Row) -> tuple[str, str]:
    return row.instruction, row.context


def _draw(rows: list[Row], fraction: float, salt: str) -> set[tuple[str, str]]:
    """A fraction of the different prompts, at least one: those whose salted hashes are the smallest."""
    prompts = {_prompt(row) for row in rows}
    count = max(1, round(fraction * len(prompts)))

    def key(prompt: tuple[str, str]) -> bytes:
        return hashlib.sha256(json.dumps([salt, *prompt]).encode()).digest()

    return set(sorted(prompts, key=key)[:count])


# Tokenizing ---------------------------------------------------------------------------------------------------------


def encode(
    rows: list[Row], tokenizer: Any, template: str, seq_len: int, overlong: Literal["drop", "truncate"]
) -> tuple[list[Example], Overlong]:
    """Render and tokenize rows; rows of more than `seq_len` tokens are dropped or cut, and counted.

    `truncate` cuts the end of the response: EOS goes with it, so the model is not taught to stop in mid-sentence, and
    the row's text stays whole as the reference for scores. A row whose prompt alone fills seq_len has nothing to
    learn and is dropped either way.
    """
    prompts = [templates.render_prompt(tokenizer, template, row.instruction, row.context) for row in rows]
    pairs = templates.tokenize_pair(tokenizer, prompts, [row.response for row in rows])
    examples, counts = [], Overlong()
    for row, prompt, (prompt_ids, response_ids) in zip(rows, prompts, pairs, strict=True):
        room = seq_len - len(prompt_ids)
        if len(response_ids) > room:
            if room <= 0 or overlong == "drop":
                counts.dropped += 1
                continue
            response_ids = response_ids[:room]
            counts.truncated += 1
        examples.append(Example(row, prompt, prompt_ids, response_ids))
    return examples, counts


# Packing ------------------------------------------------------------------------------------------------------------


def assign(lengths: Sequence[int], seq_len: int, seed: int) -> list[list[int]]:
    """Which documents share a packed row: best fit over a seeded order. Returns document numbers by packed row.

    Best fit puts each document into the fullest row that still takes it. The order is shuffled and not by length,
    which would pack a little tighter, but gather documents of one length, thus often of one category, in one step.
    """
    order = random.Random(seed).sample(range(len(lengths)), len(lengths))
    packed: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, number of the packed row), sorted
    for document in order:
        length = lengths[document]
        place = bisect.bisect_left(rooms, (length, 0))
        if place < len(rooms):
            room, number = rooms.pop(place)
        else:
            room, number = seq_len, len(packed)
            packed.append([])
        packed[number].append(document)
        if room > length:
            bisect.insort(rooms, (room - length, number))
    return packed


def packed_row(examples: Sequence[Example], seq_len: int, pad_token_id: int) -> dict[str, list[int]]:
    """Lay documents into one row: four lists of `seq_len` ints, and row_ids, the documents' lines in the source.

    input_ids; labels (aligned with input_ids as HF has them, IGNORED on prompts and padding); position_ids, which
    restart at 0 in each document; document_ids, 1, 2, … and 0 for padding. Each document begins with prompt tokens,
    so the shifted loss never asks one document to predict the next.
    """
    row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": [], "document_ids": []}
    for number, example in enumerate(examples, 1):
        row["input_ids"] += example.prompt_ids + example.response_ids
        row["labels"] += [IGNORED] * len(example.prompt_ids) + example.response_ids
        row["position_ids"] += range(len(example))
        row["document_ids"] += [number] * len(example)
    padding = seq_len - len(row["input_ids"])
    fill = {"input_ids": pad_token_id, "labels": IGNORED, "position_ids": 0, "document_ids": 0}
    padded = {column: values + [fill[column]] * padding for column, values in row.items()}
    return padded | {"row_ids": [example.row.id for example in examples]}


def pack(
    examples: list[Example], seq_len: int, pad_token_id: int, packing: bool, seed: int
) -> list[dict[str, list[int]]]:
    """All packed rows; with `packing` false, one document a row in the order of the file."""
    if packing:
        assigned = assign([len(example) for example in examples], seq_len, seed)
    else:
        assigned = [[number] for number in range(len(examples))]
    return [packed_row([examples[number] for number in numbers], seq_len, pad_token_id) for numbers in assigned]


# Writing and counting -----------------------------------------------------------------------------------------------


def write_parquet(path: Path, packed: list[dict[str, list[int]]]) -> None:
    """Write packed rows: columns input_ids, labels, position_ids, document_ids, each a list<int32> of seq_len,
    and row_ids, a list<int32> with one for each document."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {column: pa.array([row[column] for row in packed], pa.list_(pa.int32())) for column in packed[0]}
    with atomic_file(path) as partial:
        pq.write_table(pa.table(columns), partial, compression="zstd")


def example_record(example: Example) -> dict[str, Any]:
    """What validation.jsonl and test.jsonl hold of an example."""
    row = example.row
    return {
        "id": row.id,
        "category": row.category,
        "instruction": row.instruction,
        "context": row.context,
        "response": row.response,
        "prompt": example.prompt,
        "prompt_token_ids": example.prompt_ids,
        "response_token_ids": example.response_ids,
    }


def response_statistics(responses: list[str]) -> dict[str, float]:
    """Mean sentences and mean words of a response.

    Sentences by nltk's Punkt, which learns abbreviations from these very responses: its trained models would have to
    be downloaded. Words are nltk's wordpunct tokens that hold a letter or digit.
    """
    from nltk.tokenize import PunktSentenceTokenizer, wordpunct_tokenize

    punkt = PunktSentenceTokenizer("\n\n".join(responses))
    sentences = sum(len(punkt.tokenize(response)) for response in responses)
    words = sum(any(map(str.isalnum, token)) for response in responses for token in wordpunct_tokenize(response))
    return {"mean_sentences": round(sentences / len(responses), 3), "mean_words": round(words / len(responses), 3)}
