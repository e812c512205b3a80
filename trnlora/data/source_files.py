"""The files that data.source names, of whatever kind, as files of JSON Lines.

A plain .jsonl file is read where it is. Everything else is written once to a temporary folder, a JSON object on each
line, with the types that it has there: `trnlora.data.formats` then checks every row, whatever it came from.

The library `datasets` finds the files of a hub data set's configurations and splits. It does not read them: its loaders
of JSON and CSV guess types, so that 007 becomes 7 and NA nothing, turn text that looks like a date into one, and fill
missing columns with null; that of Parquet holds whole row groups in memory.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from trnlora.data.formats import detect, short
from trnlora.data.rows import RowsFile, parse_line, stripped
from trnlora.errors import UserError
from trnlora.files import sha256
from trnlora.params import Data, DataSource
from trnlora.sources import Source, hub_snapshot, newest_commit, parse_source

LINES = (".jsonl", ".ndjson")
KINDS = (*LINES, ".json", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def data_sources(params: Data) -> list[DataSource]:
    """The sources of data.source, each with a format and columns: its own, or else those of `data`."""
    source = params.source
    given = [DataSource(source=source, sha256=params.sha256)] if isinstance(source, str) else source
    return [
        source.model_copy(
            update={
                "format": source.format or params.format,
                "columns": params.columns if source.columns is None else source.columns,
            }
        )
        for source in given
    ]


def open_sources(sources: Iterable[DataSource], folder: Path) -> list[RowsFile]:
    """The files of all sources, and what was found in them. `folder`: for temporary files, as large as the data."""
    files: list[RowsFile] = []
    offset = 0
    for number, source in enumerate(sources):
        opened, offset = open_source(number, source, offset, folder)
        files += opened
    for file in files:
        print(f"{file.shown}: {file.format}", flush=True)
    return files


def open_source(number: int, source: DataSource, offset: int, folder: Path) -> tuple[list[RowsFile], int]:
    """The files of a source in the order of their names, with the format of each; and the offset of what follows.

    offset: the number of lines in the files of the sources before. Raises UserError for a source that cannot be read.
    """
    opened: list[RowsFile] = []
    for file in find_files(source):
        shown = shown_name(file, source)
        kind, compression = file_kind(file)
        if kind in LINES and not compression:
            path, unit = file, "line"
        else:
            path = folder / f"{offset}.jsonl"
            unit = write_lines(file, kind, compression, path)
        first = first_row(path, f"{shown} {unit}")
        if first is None:
            raise UserError(f"{shown} holds no rows")
        line, values = first
        form = detect(values, source.format or "auto", source.columns or {}, f"{shown} {unit} {line}")
        opened.append(RowsFile(path, form, offset, shown, unit, sha256(file), number, source.weight, source.rows))
        offset += count_lines(path)
    return opened, offset


def find_files(source: DataSource) -> list[Path]:
    """The data files of a source, downloaded if it is on the hub."""
    parsed = parse_source(source.source)
    if parsed.scheme == "hf":
        files = hub_files(parsed, source)
    elif parsed.path.is_dir():
        files = sorted(path for path in parsed.path.rglob("*") if path.is_file() and file_kind(path)[0] in KINDS)
        if not files:
            raise UserError(f"data.source: {parsed.path} holds no data files ({', '.join(KINDS)})")
    elif parsed.path.is_file():
        files = [parsed.path]
    else:
        raise UserError(f"data.source: there is no {parsed.path}; path:// is relative to {Path.cwd()}")
    if source.sha256 is not None:
        if len(files) > 1:
            raise UserError(f"data.sha256 is that of one file, but {source.source} holds {len(files)}: set it to null")
        if (actual := sha256(files[0])) != source.sha256:
            raise UserError(
                f"{files[0]} has sha256 {actual}, but data.sha256 pins {source.sha256}: the file has changed"
            )
    return files


def shown_name(file: Path, source: DataSource) -> str:
    """What messages call a file: for one of the hub, not where this machine's cache has it."""
    if source.source.startswith("hf://"):
        return f"{source.source}/{re.split('/snapshots/[0-9a-f]{40}/', file.as_posix(), maxsplit=1)[-1]}"
    return str(file)


def hub_files(parsed: Source, source: DataSource) -> list[Path]:
    """The files of a configuration and split of a hub data set, as `datasets` finds them (README.md, file names)."""
    patterns = ["README.md", *(f"*{kind}{suffix}" for kind in KINDS for suffix in ("", *COMPRESSED))]
    folder = hub_snapshot(parsed, patterns, repo_type="dataset")
    if not parsed.is_pinned:
        newer = newest_commit(parsed, "dataset")
        changed = f"; the hub has a newer one, {newer}" if newer not in (None, folder.name) else ""
        print(f"{parsed.uri} is not pinned: this run uses {parsed.name}@{folder.name}{changed}", flush=True)
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError

    try:
        builder = load_dataset_builder(str(folder), source.config)
    except (DatasetsError, ValueError) as error:
        raise UserError(f"{source.source}: {' '.join(str(error).split())[:300]}") from None
    by_split = builder.config.data_files or {}
    names = ", ".join(map(str, by_split))
    if source.split is None and len(by_split) > 1:
        raise UserError(f"{source.source} has the splits {names}: name one, data.source: [{{source: …, split: …}}]")
    split = source.split or next(iter(by_split), "train")
    if split not in by_split:
        raise UserError(f"{source.source} has no split {split}: it has {names or 'none'}")
    return [Path(file) for file in by_split[split]]


def file_kind(path: Path) -> tuple[str, str]:
    """The kind of a file by its name, and its compression: ('.csv', '.gz') for rows.csv.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSED else ""
    return suffixes[-1] if suffixes else "", compression


def write_lines(file: Path, kind: str, compression: str, target: Path) -> str:
    """Write the rows of a file to `target` as JSON Lines, and return what one of them is called: line or row."""
    if kind not in KINDS:
        raise UserError(
            f"data.source: {file} is not a data file: {', '.join(KINDS)}, each also with {', '.join(COMPRESSED)}"
        )
    if kind == ".parquet":
        if compression:
            raise UserError(f"{file} is a compressed Parquet file, which is compressed in itself: decompress it")
        write_rows(parquet_rows(file), file, target)
        return "row"
    try:
        with decompressed(file, compression) as plain:
            if kind in (".csv", ".tsv"):
                text = io.TextIOWrapper(plain, "utf-8-sig", newline="")
                write_rows(csv_rows(text, "," if kind == ".csv" else "\t", file), file, target)
                return "row"
            if kind == ".json" and (start := array_start(file, compression)) is not None:
                plain.read(start)
                write_rows(array_rows(plain, file), file, target)
                return "row"
            with target.open("wb") as out:
                shutil.copyfileobj(plain, out)
            return "line"
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None


def decompressed(file: Path, compression: str) -> Any:
    """The content of a file without its compression, as a binary file."""
    if compression == ".gz":
        return gzip.open(file)
    if compression == ".bz2":
        return bz2.open(file)
    if compression == ".xz":
        return lzma.open(file)
    if compression == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(str(file), "zstd"))
    return file.open("rb")


def array_start(file: Path, compression: str) -> int | None:
    """The position of the [ that a file begins with, behind white space and a byte order mark; None for other text."""
    with decompressed(file, compression) as opened:
        head: bytes = opened.read(1024)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    return len(head) - len(text) if text.startswith(b"[") else None


def array_rows(file: IO[bytes], path: Path) -> Iterator[Any]:
    """The elements of a JSON array, one at a time."""
    import ijson

    try:
        yield from ijson.items(file, "item", use_float=True)
    except (ijson.JSONError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({' '.join(str(error).split())[:100]})") from None


def csv_rows(text: IO[str], separator: str, file: Path) -> Iterator[dict[str, str]]:
    """The rows of a CSV file by the names in its first row. Every value is text, also 007, NA and an empty one."""
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader(text, delimiter=separator, strict=True)
    try:
        names = next(rows, [])
        if not names or len(set(names)) < len(names):
            raise UserError(f"{file} must begin with the names of its columns, each once, not with {short(names)}")
        for number, row in enumerate(filter(None, rows), 1):  # empty lines are no rows
            if len(row) != len(names):
                raise UserError(f"{file} row {number} has {len(row)} values for {len(names)} columns: {short(row)}")
            yield dict(zip(names, row, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{file} line {rows.line_num + 1} cannot be read: {error}") from None


def parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, in bounded memory however large its row groups are (pandas writes a single one)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as opened:
            for batch in opened.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (pa.ArrowException, ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())[:200]}") from None


def write_rows(rows: Iterable[Any], file: Path, target: Path) -> None:
    """Write rows as JSON Lines. Raises UserError for a value that JSON does not have, such as a date."""
    with target.open("w", encoding="utf-8", errors="surrogatepass") as out:
        for number, row in enumerate(rows, 1):
            try:
                out.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"{file} row {number} holds a value that is not text: {error} in {short(row)}"
                ) from None


def first_row(path: Path, shown: str) -> tuple[int, Any] | None:
    """The number and the value of the first line that is not empty; None if there is none."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if content := stripped(line, number):
                return number, parse_line(content, f"{shown} {number}")
    return None


def count_lines(path: Path) -> int:
    """The number of lines of a file, also if the last one has no line end."""
    lines, block = 0, b"\n"
    with path.open("rb") as file:
        while read := file.read(8 << 20):
            block = read
            lines += block.count(b"\n")
    return lines + (not block.endswith(b"\n"))
