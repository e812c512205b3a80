"""The rows of a data set: where the file comes from, reading it in chunks, checking every line."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from trnlora.errors import UserError
from trnlora.files import parse_json, sha256
from trnlora.sources import hub_snapshot, parse_source

COLUMNS = ("instruction", "context", "response", "category")
SPLIT_VALUES = ("train", "test")  # of the optional column `split`; validation rows are always drawn from train rows
CHUNK_BYTES = 8 << 20  # of the file, that one process reads at a time


@dataclass(frozen=True)
class Row:
    """One row of the file, stripped of leading and trailing white space. `line` is its line number, from 1."""

    line: int
    instruction: str
    context: str  # may be empty
    response: str
    category: str
    split: str | None  # train | test; None when the file has no such column


class Chunk(NamedTuple):
    """Whole lines of a file: its bytes from `start` to `end`. `line` is the number of the first line, from 1."""

    start: int
    end: int
    line: int


def fetch_rows_file(uri: str, pinned_sha256: str | None) -> Path:
    """The JSONL file that `data.source` names, downloaded if it is on the hub.

    Raises UserError if it cannot be fetched or if its sha256 is not the pinned one.
    """
    source = parse_source(uri)
    if source.scheme == "hf":
        files = sorted(hub_snapshot(source, ["*.jsonl"], repo_type="dataset").rglob("*.jsonl"))
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "none"
            raise UserError(
                f"{uri} must hold exactly one .jsonl file, but it holds {names}: "
                "download the one you want and use a path:// source"
            )
        path = files[0]
    else:
        path = source.path
        if not path.is_file():
            raise UserError(f"data.source: {path} is not a file; path:// is relative to {Path.cwd()}")
    if pinned_sha256 is not None and (actual := sha256(path)) != pinned_sha256:
        raise UserError(f"{path} has sha256 {actual}, but data.sha256 pins {pinned_sha256}: the file has changed")
    return path


def chunks(path: Path, size: int | None = None) -> list[Chunk]:
    """Divide a file into chunks of about `size` bytes (default: CHUNK_BYTES)."""
    size = size or CHUNK_BYTES
    found, start, line = [], 0, 1
    with path.open("rb") as file:
        while block := file.read(size):
            block += file.readline()
            found.append(Chunk(start, start + len(block), line))
            start, line = start + len(block), line + block.count(b"\n")
    return found


def read_jsonl_rows(path: Path, chunk: Chunk | None = None) -> list[Row]:
    """Read and check the rows of a chunk of a JSONL file (default: of the whole file).

    Raises UserError naming the file and the first bad line.
    """
    rows = []
    start, end, first = chunk or (0, path.stat().st_size, 1)
    with path.open("rb") as file:
        file.seek(start)
        # Split as bytes: str.splitlines would also split at U+2028 and similar characters inside a JSON string.
        for number, line in enumerate(file.read(end - start).split(b"\n"), first):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark that some editors write
            if line := line.strip():
                rows.append(_parse_row(line, number, f"{path} line {number}"))
    return rows


def _parse_row(line: bytes, number: int, where: str) -> Row:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not valid UTF-8 ({error.reason} at byte {error.start})") from None
    values = parse_json(text, where)
    if not isinstance(values, dict):
        raise UserError(f"{where} is not a JSON object with the columns {', '.join(COLUMNS)}")
    for column in COLUMNS:
        if column not in values:
            raise UserError(f"{where} has no column {column!r} (required: {', '.join(COLUMNS)})")
        value = values[column]
        if not isinstance(value, str):
            raise UserError(f"{where}: {column} must be a string, but it is {json.dumps(value)[:60]}")
        if column != "context" and not value.strip():
            raise UserError(f"{where}: {column} is empty")
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            raise UserError(f"{where}: {column} contains half of a surrogate pair, which no tokenizer accepts")
    split = values.get("split")
    if "split" in values and split not in SPLIT_VALUES:
        raise UserError(f"{where}: split must be train or test, but it is {json.dumps(split)[:60]}")
    return Row(number, **{column: values[column].strip() for column in COLUMNS}, split=split)
