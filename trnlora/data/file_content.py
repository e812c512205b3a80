"""What the data's files hold, of whatever kind and compression, written as JSON Lines with the types that it has there.

Nothing is converted and nothing left out in silence: text is UTF-8, a column or key that is there twice is an error,
compressed files are read to their last byte, and a value that JSON does not have, such as a date, becomes an object
with its type, so that `trnlora.data.formats` refuses it where text belongs and ignores it in columns that are not used.
"""

import bz2
import csv
import errno
import gzip
import io
import json
import lzma
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from trnlora.data.formats import short
from trnlora.data.rows import MAX_ROW_BYTES
from trnlora.errors import UserError
from trnlora.readers import unique_keys

LINES = (".jsonl", ".ndjson")
KINDS = (*LINES, ".json", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")

# How files of other kinds begin. Text begins with none of these.
OTHER_CONTENT = {
    b"\x1f\x8b": "is compressed with gzip: name it .gz too",
    b"BZh": "is compressed with bzip2: name it .bz2 too",
    b"\xfd7zXZ\0": "is compressed with xz: name it .xz too",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd: name it .zst too",
    b"PK\x03\x04": "is a ZIP archive or an office document: unpack it, or save it as CSV",
    b"PAR1": "is a Parquet file: name it .parquet",
    b"\xff\xfe": "is UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "is UTF-16 text: save it as UTF-8",
}

BLOCK = 1 << 20  # bytes or characters that are read at a time
CHECK_EVERY = 64 << 20  # bytes that are written between two looks at the space that is left
KEPT_FREE = 1 << 30  # bytes of the temporary folder's disk that are left for others
# More than these are not data but a decompression bomb. Chats shrink to a fifth, rows from one pattern to a hundredth.
MAX_EXPANSION, BOMB_BYTES = 250, 256 << 20


def file_kind(path: Path) -> tuple[str, str]:
    """The kind of a file by its name, and its compression: ('.csv', '.gz') for rows.csv.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSED else ""
    return suffixes[-1] if suffixes else "", compression


def check_beginning(head: bytes, file: str) -> None:
    """Raise UserError if a text file begins as one of another kind does. file: what errors call it."""
    for begin, fault in OTHER_CONTENT.items():
        if head.startswith(begin):
            raise UserError(f"{file} {fault}")


class LinesFile:
    """The JSON Lines file that the rows of another file are written to.

    `write` raises UserError when the disk is nearly full, and for a file that expands as no data does.
    """

    def __init__(self, target: Path, file: Path, compression: str) -> None:
        self._out = target.open("wb")
        self._target, self._file = target, file
        self._limit = max(BOMB_BYTES, MAX_EXPANSION * file.stat().st_size) if compression else None
        self._written = self._checked = 0

    def __enter__(self) -> "LinesFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()

    def write(self, content: bytes) -> None:
        self._out.write(content)
        self._written += len(content)
        if self._limit is not None and self._written > self._limit:
            raise UserError(
                f"{self._file} expands to more than {MAX_EXPANSION} times its size, which is not a data set: "
                "decompress it yourself if it is one"
            )
        if self._written - self._checked >= CHECK_EVERY:
            self._checked = self._written
            if shutil.disk_usage(self._target.parent).free < KEPT_FREE:
                raise UserError(
                    f"{self._file} needs more temporary space than {self._target.parent.parent} has: "
                    "set TMPDIR to a folder on a larger disk"
                )


def write_lines(file: Path, kind: str, compression: str, target: Path) -> str:
    """Write the rows of a file to `target` as JSON Lines, and return what one of them is called: line or row."""
    if kind not in KINDS:
        raise UserError(
            f"data.source: {file} is not a data file: {', '.join(KINDS)}, each also with {', '.join(COMPRESSED)}"
        )
    if kind == ".parquet" and compression:
        raise UserError(f"{file} is a compressed Parquet file, which is compressed in itself: decompress it")
    with LinesFile(target, file, compression) as out:
        if kind == ".parquet":
            write_rows(parquet_rows(file), out)
            return "row"
        try:
            with decompressed(file, compression) as plain:
                head = plain.read(1024)
            check_beginning(head, str(file))
            with decompressed(file, compression) as plain:
                if kind in (".csv", ".tsv"):
                    text = io.TextIOWrapper(plain, "utf-8-sig", newline="")
                    write_rows(csv_rows(text, "," if kind == ".csv" else "\t", file), out)
                    return "row"
                if kind == ".json" and head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                    write_rows(array_rows(io.TextIOWrapper(plain, "utf-8-sig", newline=""), file), out)
                    return "row"
                while block := plain.read(BLOCK):
                    out.write(block)
                return "line"
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
                raise
            raise UserError(f"{file} cannot be read: {error}") from None


def decompressed(file: Path, compression: str) -> Any:
    """The content of a file without its compression, as a binary file. Reading raises OSError for a damaged one."""
    if compression == ".gz":
        return gzip.open(file)
    if compression == ".bz2":
        return io.BufferedReader(StreamReader(file, bz2.BZ2Decompressor))
    if compression == ".xz":
        return io.BufferedReader(StreamReader(file, lzma.LZMADecompressor))
    if compression == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(str(file), "zstd"))
    return file.open("rb")


class StreamReader(io.RawIOBase):
    """One or more compressed streams, end to end. bz2.open and lzma.open end in silence at one that is damaged."""

    def __init__(self, file: Path, decompressor: Any) -> None:
        self._file = file.open("rb")
        self._new = decompressor
        self._stream = decompressor()
        self._rest = b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._stream.eof:
                self._rest = self._stream.unused_data or self._file.read(BLOCK)
                if not self._rest.strip(b"\0"):  # xz may pad a file with zeros
                    return 0
                self._stream = self._new()
            elif self._stream.needs_input and not self._rest:
                self._rest = self._file.read(BLOCK)
                if not self._rest:
                    raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            content = self._stream.decompress(self._rest, len(buffer))
            self._rest = b""
            if content:
                buffer[: len(content)] = content
                return len(content)


class ArrayReader:
    """The elements of a JSON array, read and parsed one at a time."""

    _SPACE = re.compile(r"[ \t\r\n]*")

    def __init__(self, text: IO[str]) -> None:
        self._text = text
        self._decoder = json.JSONDecoder(object_pairs_hook=unique_keys)
        self._buffer, self._position, self._at_end = "", 0, False

    def elements(self) -> Iterator[Any]:
        """Raises ValueError or RecursionError for what is not JSON."""
        self._take()  # the [
        separator = "," if self._peek() != "]" else self._take()
        while separator == ",":
            self._peek()
            yield self._value()
            separator = self._take()
            if separator not in (",", "]"):
                raise ValueError(f"{short(separator)} where , or ] belongs" if separator else "the array does not end")
        if more := self._peek():
            raise ValueError(f"{short(more)} follows the array")

    def _fill(self) -> None:
        """Read as much again as is there, so that a large element is not parsed too often."""
        more = self._text.read(max(BLOCK, len(self._buffer) - self._position))
        self._buffer, self._position, self._at_end = self._buffer[self._position :] + more, 0, not more

    def _peek(self) -> str:
        """The next character that is not white space; an empty string at the end."""
        while True:
            space = self._SPACE.match(self._buffer, self._position)
            self._position = space.end() if space else self._position
            if self._position < len(self._buffer) or self._at_end:
                return self._buffer[self._position : self._position + 1]
            self._fill()

    def _take(self) -> str:
        char = self._peek()
        self._position += len(char)
        return char

    def _value(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._position)
                if end + len("e+1") <= len(self._buffer) or self._at_end:  # otherwise a number may go on
                    self._position = end
                    return value
            except json.JSONDecodeError as error:
                if self._at_end or len(self._buffer) - self._position > MAX_ROW_BYTES:
                    raise ValueError(error.msg) from None
            self._fill()


def array_rows(text: IO[str], file: Path) -> Iterator[Any]:
    """The elements of a JSON array. Raises UserError, naming the row, for what is not JSON."""
    row = 0
    try:
        for value in ArrayReader(text).elements():
            row += 1
            yield value
    except (ValueError, RecursionError) as error:  # ValueError: also invalid UTF-8, a key twice, 5,000 digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())[:100]
        raise UserError(f"{file} row {row + 1} is not valid JSON ({reason})") from None


def csv_rows(text: IO[str], separator: str, file: Path) -> Iterator[dict[str, str]]:
    """The rows of a CSV file by the names in its first row. Every value is text, also 007, NA and an empty one."""
    csv.field_size_limit(MAX_ROW_BYTES)
    rows = csv.reader(text, delimiter=separator, strict=True)
    try:
        names = next(rows, [])
        if not names or len(set(names)) < len(names):
            raise UserError(f"{file} must begin with the names of its columns, each once, not with {short(names)}")
        for number, row in enumerate(filter(None, rows), 1):  # empty lines are not rows
            if len(row) != len(names):
                raise UserError(f"{file} row {number} has {len(row)} values for {len(names)} columns: {short(row)}")
            yield dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{file} line {rows.line_num} cannot be read: {error}") from None
    except UnicodeDecodeError as error:  # somewhere in the next block of bytes
        fault = f"{error.reason}, byte 0x{error.object[error.start]:02x}"
        raise UserError(f"{file} is not valid UTF-8 after line {rows.line_num} ({fault}): save it as UTF-8") from None


def parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, in bounded memory however large its row groups are (pandas writes a single one)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as opened:
            names = opened.schema_arrow.names
            if len(set(names)) < len(names):
                raise UserError(f"{file} has a column twice: {short(names)}")
            for batch in opened.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError, OSError) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())[:200]}") from None


def write_rows(rows: Iterable[Any], out: LinesFile) -> None:
    """Write rows as JSON Lines. What JSON does not have becomes {type: value}, which is not text."""
    for row in rows:
        line = json.dumps(row, ensure_ascii=False, default=_typed)
        try:
            out.write(line.encode() + b"\n")
        except UnicodeEncodeError:  # half of a surrogate pair, which is refused where it is used
            out.write(json.dumps(row, default=_typed).encode() + b"\n")


def _typed(value: Any) -> dict[str, str]:
    return {type(value).__name__: repr(value)[:60]}
