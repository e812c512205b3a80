"""The files of rows of a data set: reading them in chunks that processes share, checking every row."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from trnlora.data.examples import FileEntry
from trnlora.data.formats import Row, RowFormat
from trnlora.errors import UserError
from trnlora.readers import parse_json

CHUNK_BYTES = 8 << 20  # of a file, that one process reads at a time
MAX_ROW_BYTES = 64 << 20  # of a row; a longer one is not a row but a file without line ends


@dataclass(frozen=True)
class RowsFile:
    """A file of JSON Lines. It may hold the rows of another file, of another kind, which errors then name.

    offset: the number of lines in the files before it. A row's id is its line number plus that.
    """

    path: Path
    format: RowFormat
    offset: int
    shown: str  # what errors call the file
    unit: str  # and one of its rows: line | row
    sha256: str  # of the file that errors name
    source: int = 0  # which of the sources it belongs to
    weight: float = 1.0  # of params.DataSource, and so `rows`
    rows: int | None = None

    def where(self, line: int) -> str:
        """What errors and warnings call a line or row."""
        return f"{self.shown} {self.unit} {line}"

    def row_name(self, id: int) -> str:
        return self.where(id - self.offset)


def file_table(files: list[RowsFile]) -> list[FileEntry]:
    """What names a row by its id, also in a later stage."""
    return [
        {"file": f.shown, "unit": f.unit, "offset": f.offset, "format": str(f.format), "sha256": f.sha256}
        for f in files
    ]


class Chunk(NamedTuple):
    """Whole lines of a file: its bytes from `start` to `end`. `line` is the number of the first line, from 1."""

    file: RowsFile
    start: int
    end: int
    line: int

    @property
    def first_id(self) -> int:
        return self.file.offset + self.line


def chunks(file: RowsFile, size: int | None = None) -> list[Chunk]:
    """Divide a file into chunks of about `size` bytes (default: CHUNK_BYTES)."""
    size = size or CHUNK_BYTES
    found, start, line = [], 0, 1
    with file.path.open("rb") as opened:
        while block := opened.read(size):
            block += whole_line(opened.readline(MAX_ROW_BYTES), file.where(line + block.count(b"\n")))
            found.append(Chunk(file, start, start + len(block), line))
            start, line = start + len(block), line + block.count(b"\n")
    return found


def whole_line(line: bytes, where: str) -> bytes:
    """A line that was read with readline(MAX_ROW_BYTES). Raises UserError with `where` if it is longer than that."""
    if len(line) >= MAX_ROW_BYTES:
        raise UserError(f"{where} is longer than {MAX_ROW_BYTES >> 20} MiB: each line must hold one row")
    return line


def numbered_lines(path: Path, shown: str) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers, from 1. Raises UserError (`shown` and the number) for one too long."""
    with path.open("rb") as file:
        number = 1
        while line := whole_line(file.readline(MAX_ROW_BYTES), f"{shown} {number}"):
            yield number, line
            number += 1


def read_rows(chunk: Chunk) -> list[Row]:
    """Read and check the rows of a chunk. Raises UserError naming the file and the first bad line."""
    rows = []
    with chunk.file.path.open("rb") as opened:
        opened.seek(chunk.start)
        # Split as bytes: str.splitlines would also split at U+2028 and similar characters inside a JSON string.
        for number, line in enumerate(opened.read(chunk.end - chunk.start).split(b"\n"), chunk.line):
            if line := stripped(line, number):
                where = chunk.file.where(number)
                rows.append(chunk.file.format.read(parse_line(line, where), chunk.file.offset + number, where))
    return rows


def stripped(line: bytes, number: int) -> bytes:
    """A line without white space at its ends, and without the byte order mark that some editors write."""
    return (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip()


def parse_line(line: bytes, where: str) -> object:
    """The JSON value of a line. Raises UserError with `where` for what is not UTF-8 or JSON."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not valid UTF-8 ({error.reason} at byte {error.start})") from None
    return parse_json(text, where)
