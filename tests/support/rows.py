"""Rows and files of rows for the tests of the data."""

import tempfile
from pathlib import Path

from trnlora.data.formats import Message, Row
from trnlora.data.rows import RowsFile, chunks, read_rows
from trnlora.data.source_files import open_sources
from trnlora.params import DataSource


def question(
    id: int, instruction: str, context: str, response: str, category: str = "talk", split: str | None = None
) -> Row:
    """A row of one question and its answer."""
    return Row(id, (Message("user", instruction, context), Message("assistant", response)), category, split)


def open_file(path: Path, folder: Path | None = None, **settings: object) -> list[RowsFile]:
    """The files of a source, as prepare_data opens it. `folder`: for temporary files; by default beside the file."""
    folder = folder or path.parent / "lines"
    folder.mkdir(exist_ok=True)
    return open_sources([DataSource(source=f"path://{path}", **settings)], folder)  # type: ignore[arg-type]


def rows_of(path: Path, **settings: object) -> list[Row]:
    """All rows of a source."""
    with tempfile.TemporaryDirectory() as folder:
        files = open_file(path, Path(folder), **settings)
        return [row for file in files for chunk in chunks(file) for row in read_rows(chunk)]
