"""From a file of rows to packed training rows: reading, splitting, tokenizing, packing.

The order of the functions is the order in which stages/prepare_data.py calls them. Everything is a function of the
file and the params: two runs write the same bytes, whatever the number of processes.

A file may be larger than the memory. It is read twice, in chunks of whole lines that processes share: once for what the
split needs to know of each row, once to tokenize. Token ids wait in a temporary file until they are packed.
"""

import contextlib
import hashlib
import heapq
import itertools
import json
import multiprocessing
import os
import random
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np

from trnlora.data import templates
from trnlora.errors import UserError
from trnlora.files import atomic_file, parse_json, sha256
from trnlora.sources import hub_snapshot, parse_source

IGNORED = -100  # the label where nothing is to be learnt: torch's and HF's default ignore_index

COLUMNS = ("instruction", "context", "response", "category")
CHUNK_BYTES = 8 << 20  # of the file, that one process takes at a time
GROUP_TOKENS = 4 << 20  # of a parquet file's row group, which is in memory as a whole
STATISTICS_ROWS = 20_000  # whose responses are looked at: Punkt learns from all of its text at once

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

    @property
    def line(self) -> int:
        return self.row.id


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


class Chunk(NamedTuple):
    """Whole lines of a file: bytes `start` to `end`, the first of which is line number `line`, from 1."""

    start: int
    end: int
    line: int


def chunks(path: Path, size: int = CHUNK_BYTES) -> list[Chunk]:
    """A file's chunks of about `size` bytes."""
    found, start, line = [], 0, 1
    with path.open("rb") as file:
        while block := file.read(size):
            block += file.readline()
            found.append(Chunk(start, start + len(block), line))
            start, line = start + len(block), line + block.count(b"\n")
    return found


def read_rows(path: Path, chunk: Chunk | None = None) -> list[Row]:
    """Read and check the rows of a chunk of a JSONL file, or of all of it.

    Raises UserError naming the file and the line of the first bad one.
    """
    rows = []
    start, end, first = chunk or (0, path.stat().st_size, 1)
    with path.open("rb") as file:
        file.seek(start)
        # Lines are split as bytes: str.splitlines would also split at U+2028 and its like inside a string.
        for number, line in enumerate(file.read(end - start).split(b"\n"), first):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark that some editors write
            if line := line.strip():
                rows.append(_parse(line, number, f"{path} line {number}"))
    return rows


@dataclass(frozen=True, slots=True)
class Key:
    """What choosing and splitting need to know of a row. Rows with the same prompt have the same hashes."""

    id: int
    category: str
    split: str | None
    test_hash: bytes
    validation_hash: bytes


def key(row: Row, seed: int) -> Key:
    """The key of a row, in a split with `seed`."""
    hashes = (
        hashlib.sha256(json.dumps([f"{seed} {split}", row.instruction, row.context]).encode()).digest()
        for split in ("test", "validation")
    )
    return Key(row.id, row.category, row.split, *hashes)


def read_keys(path: Path, seed: int, pool: Executor | None = None) -> list[Key]:
    """The keys of all rows of a file, in its order. Raises UserError for the first bad line."""
    interned: dict[str, str] = {}
    keys = [
        Key(one.id, interned.setdefault(one.category, one.category), one.split, one.test_hash, one.validation_hash)
        for members in in_order(pool, _keys, [(path, chunk, seed) for chunk in chunks(path)])
        for one in members
    ]
    if not keys:
        raise UserError(f"{path} holds no rows")
    without = next((one.id for one in keys if one.split is None), None)
    if without is not None and any(one.split is not None for one in keys):
        raise UserError(f"{path} line {without} has no column 'split', but other lines do: give it to all or none")
    return keys


def _keys(path: Path, chunk: Chunk, seed: int) -> list[Key]:
    return [key(row, seed) for row in read_rows(path, chunk)]


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


def keep_categories(rows: list[Key], categories: list[str] | None) -> list[Key]:
    """The rows of these categories; None keeps all. Raises UserError for a category that no row has."""
    if categories is None:
        return rows
    existing = sorted({row.category for row in rows})
    unknown = sorted(set(categories) - set(existing))
    if unknown or not categories:
        wrong = f"no row has {', '.join(unknown)}" if unknown else "the list is empty; null keeps all"
        raise UserError(f"data.categories: {wrong}; the rows have {', '.join(existing)}")
    return [row for row in rows if row.category in categories]


def split_rows(rows: list[Key], test_fraction: float, validation_fraction: float) -> dict[str, list[Key]]:
    """Rows by split: train, validation, test, each in the order of the file. Raises UserError when one is empty.

    A column `split` decides what is a test row; without one, `test_fraction` of the rows are drawn. Validation rows
    are `validation_fraction` of the rest. Which rows are drawn depends on their prompts and the seed, not on their
    order, and rows with the same prompt stay together, so that no prompt is both learnt and tested.
    """
    splits: dict[str, list[Key]] = {"train": [], "validation": [], "test": []}
    rest: list[Key] = []
    drawn = _draw((row.test_hash for row in rows), test_fraction) if rows[0].split is None else set()
    for row in rows:
        is_test = row.test_hash in drawn if row.split is None else row.split == "test"
        (splits["test"] if is_test else rest).append(row)
    drawn = _draw((row.validation_hash for row in rest), validation_fraction)
    for row in rest:
        splits["validation" if row.validation_hash in drawn else "train"].append(row)
    for name, members in splits.items():
        if not members:
            raise UserError(f"{len(rows)} rows leave none for {name}: add rows or change data.categories or fractions")
    return splits


def _draw(hashes: Iterable[bytes], fraction: float) -> set[bytes]:
    """A fraction of the different hashes, at least one: the smallest."""
    different = set(hashes)
    return set(heapq.nsmallest(max(1, round(fraction * len(different))), different))


def split_codes(splits: dict[str, list[Key]], lines: int) -> bytes:
    """For each line of a file that has `lines`, 0 or the number of its row's split, from 1."""
    codes = bytearray(lines + 1)
    for code, members in enumerate(splits.values(), 1):
        for row in members:
            codes[row.id] = code
    return bytes(codes)


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


@dataclass
class Part:
    """What a chunk gives to a split, compactly: token ids end to end, lengths and lines of the documents."""

    documents: np.ndarray  # (documents, 3) int32: line, prompt tokens, response tokens
    tokens: np.ndarray  # int32
    categories: Counter[str]
    responses: list[str]
    records: str  # lines of JSON, for the splits that are written as JSONL too
    overlong: Overlong


def encode_chunk(
    path: Path, chunk: Chunk, codes: bytes, template: str, seq_len: int, overlong: Literal["drop", "truncate"],
    tokenizer: Any = None,
) -> list[Part]:  # fmt: skip
    """`encode` for a chunk's train, validation and test rows; codes: `split_codes` of the chunk's lines.

    tokenizer: None in a process of `process_pool`, which has one.
    """
    rows = read_rows(path, chunk)
    parts = []
    for code, split in enumerate(("train", "validation", "test"), 1):
        its_rows = [row for row in rows if codes[row.id - chunk.line] == code]
        examples, counts = encode(its_rows, tokenizer or _tokenizer, template, seq_len, overlong)
        ids = [one.prompt_ids + one.response_ids for one in examples]
        documents = [(one.row.id, len(one.prompt_ids), len(one.response_ids)) for one in examples]
        records = (
            ""
            if split == "train"
            else "".join(json.dumps(example_record(one), ensure_ascii=False) + "\n" for one in examples)
        )
        parts.append(
            Part(
                np.array(documents, np.int32).reshape(-1, 3),
                np.fromiter(itertools.chain.from_iterable(ids), np.int32),
                Counter(one.row.category for one in examples),
                [one.row.response for one in examples],
                records,
                counts,
            )
        )
    return parts


# Processes ----------------------------------------------------------------------------------------------------------

T = TypeVar("T")
_tokenizer: Any = None  # of a process of the pool


@contextlib.contextmanager
def process_pool(path: Path, tokenizer: Any = None) -> Iterator[Executor | None]:
    """Processes for a file's chunks, one a core; None where the file is too small to be worth their start."""
    processes = min(len(os.sched_getaffinity(0)), path.stat().st_size // CHUNK_BYTES)
    if processes < 2:
        yield None
        return
    # Not forked: tokenizers' threads do not survive it.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_start, initargs=(tokenizer,)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start(tokenizer: Any) -> None:
    global _tokenizer
    _tokenizer = tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of its own for each of as many processes as cores


def in_order(pool: Executor | None, work: Callable[..., T], tasks: Sequence[tuple[Any, ...]]) -> Iterator[T]:
    """work(*task) of each task, in order; few are ahead of the one that is taken, so that results do not pile up."""
    if pool is None:
        yield from itertools.starmap(work, tasks)
        return
    waiting: deque[Any] = deque()
    for task in tasks:
        waiting.append(pool.submit(work, *task))
        if len(waiting) > 2 * len(os.sched_getaffinity(0)):
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


# Packing ------------------------------------------------------------------------------------------------------------


class Document(Protocol):
    """A row as packing sees it."""

    @property
    def line(self) -> int: ...
    @property
    def prompt_ids(self) -> Any: ...  # of ints
    @property
    def response_ids(self) -> Any: ...


class Stored(NamedTuple):
    """A document of `Documents`."""

    line: int
    prompt_ids: np.ndarray
    response_ids: np.ndarray


@dataclass
class Documents(Sequence[Stored]):
    """The documents of a split: token ids in a file, which ends with this object, lengths in memory."""

    folder: Path
    _parts: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115  # open as long as this object is
        self._table = np.empty((0, 3), np.int32)
        self._starts = np.zeros(1, np.int64)

    def add(self, part: Part) -> None:
        self._parts.append(part.documents)
        part.tokens.tofile(self._file)

    def close(self) -> None:
        """No more are added."""
        self._file.flush()
        self._table = np.concatenate([self._table, *self._parts])
        self._parts.clear()
        self._starts = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])

    @property
    def lengths(self) -> np.ndarray:
        return self._table[:, 1:].sum(1, dtype=np.int64)

    @property
    def labelled(self) -> int:
        """Response tokens of all."""
        return int(self._table[:, 2].sum(dtype=np.int64))

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, number: int) -> Stored:  # type: ignore[override]
        line, prompt, response = (int(value) for value in self._table[number])
        # Read, not mapped: mapped pages would count as memory of this process.
        read = os.pread(self._file.fileno(), 4 * (prompt + response), 4 * int(self._starts[number]))
        ids = np.frombuffer(read, np.int32)
        return Stored(line, ids[:prompt], ids[prompt:])


def assign(lengths: Sequence[int] | np.ndarray, seq_len: int, seed: int) -> list[list[int]]:
    """Which documents share a packed row: best fit over a seeded order. Returns document numbers by packed row.

    Best fit puts each document into the fullest row that still takes it. The order is shuffled and not by length,
    which would pack a little tighter, but gather documents of one length, thus often of one category, in one step.
    """
    order = random.Random(seed).sample(range(len(lengths)), len(lengths))
    packed: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(seq_len + 1)]  # packed rows by the tokens left, each list a heap
    rooms = 0  # bit n: by_room[n] is not empty
    for document in order:
        length = int(lengths[document])
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            number = heapq.heappop(by_room[room])
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, number = seq_len, len(packed)
            packed.append([])
        packed[number].append(document)
        if room > length:
            heapq.heappush(by_room[room - length], number)
            rooms |= 1 << (room - length)
    return packed


def packed_row(documents: Sequence[Document], seq_len: int, pad_token_id: int) -> dict[str, np.ndarray]:
    """Lay documents into one row: four int32 arrays of `seq_len`, and row_ids, the documents' lines in the source.

    input_ids; labels (aligned with input_ids as HF has them, IGNORED on prompts and padding); position_ids, which
    restart at 0 in each document; document_ids, 1, 2, … and 0 for padding. Each document begins with prompt tokens,
    so the shifted loss never asks one document to predict the next.
    """
    fill = {"input_ids": pad_token_id, "labels": IGNORED, "position_ids": 0, "document_ids": 0}
    row = {column: np.full(seq_len, value, np.int32) for column, value in fill.items()}
    start = 0
    for number, document in enumerate(documents, 1):
        middle = start + len(document.prompt_ids)
        end = middle + len(document.response_ids)
        row["input_ids"][start:middle] = document.prompt_ids
        row["input_ids"][middle:end] = row["labels"][middle:end] = document.response_ids
        row["position_ids"][start:end] = np.arange(end - start)
        row["document_ids"][start:end] = number
        start = end
    return row | {"row_ids": np.array([document.line for document in documents], np.int32)}


def pack(
    documents: Sequence[Document],
    lengths: Sequence[int] | np.ndarray,
    seq_len: int,
    pad_token_id: int,
    packing: bool,
    seed: int,
) -> Iterator[dict[str, np.ndarray]]:
    """All packed rows, one by one; with `packing` false, one document a row in the order of the file."""
    assigned = assign(lengths, seq_len, seed) if packing else [[number] for number in range(len(lengths))]
    for numbers in assigned:
        yield packed_row([documents[number] for number in numbers], seq_len, pad_token_id)


# Writing and counting -----------------------------------------------------------------------------------------------


def write_parquet(path: Path, packed: Iterable[dict[str, Any]]) -> int:
    """Write packed rows: columns input_ids, labels, position_ids, document_ids, each a list<int32> of seq_len,
    and row_ids, a list<int32> with one for each document. Returns their number."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, writer = iter(packed), None
    written = 0
    with atomic_file(path) as partial:
        while group := list(itertools.islice(rows, 1)):
            group += itertools.islice(rows, max(0, GROUP_TOKENS // len(group[0]["input_ids"]) - 1))
            table = pa.table({column: _lists([row[column] for row in group]) for column in group[0]})
            if writer is None:
                writer = pq.ParquetWriter(partial, table.schema, compression="zstd")
            writer.write_table(table)
            written += len(group)
        assert writer is not None, "no split is empty"
        writer.close()
    return written


def _lists(rows: list[Any]) -> Any:
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(np.concatenate(rows).astype(np.int32)))


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
    """Mean sentences and mean words of a response: of the first STATISTICS_ROWS where the stage has more.

    Sentences by nltk's Punkt, which learns abbreviations from these very responses: its trained models would have to
    be downloaded. Words are nltk's wordpunct tokens that hold a letter or digit.
    """
    from nltk.tokenize import PunktSentenceTokenizer, wordpunct_tokenize

    punkt = PunktSentenceTokenizer("\n\n".join(responses))
    sentences = sum(len(punkt.tokenize(response)) for response in responses)
    words = sum(any(map(str.isalnum, token)) for response in responses for token in wordpunct_tokenize(response))
    return {"mean_sentences": round(sentences / len(responses), 3), "mean_words": round(words / len(responses), 3)}
