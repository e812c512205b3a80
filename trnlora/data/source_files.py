"""The files that data.source names, of whatever kind, as files of JSON Lines.

A plain .jsonl file is read where it is. Everything else is written once to a temporary folder, a JSON object on each
line, by `trnlora.data.file_content`; `trnlora.data.formats` then checks every row, whatever it came from.

The library `datasets` finds the files of a hub data set's configurations and splits. It does not read them: its loaders
of JSON and CSV guess types, so that 007 becomes 7 and NA nothing, turn text that looks like a date into one, and fill
missing columns with null; that of Parquet holds whole row groups in memory.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trnlora.data.file_content import BLOCK, COMPRESSED, KINDS, LINES, check_beginning, file_kind, write_lines
from trnlora.data.formats import RowFormat, detect
from trnlora.data.rows import RowsFile, numbered_lines, parse_line, stripped
from trnlora.errors import UserError
from trnlora.files import sha256
from trnlora.params import Data, DataSource
from trnlora.sources import Source, hub_snapshot, newest_commit, parse_source


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
    seen: dict[tuple[int, int], str] = {}
    for number, source in enumerate(sources):
        opened, offset = open_source(number, source, offset, folder, seen)
        files += opened
    return files


def open_source(
    number: int, source: DataSource, offset: int, folder: Path, seen: dict[tuple[int, int], str]
) -> tuple[list[RowsFile], int]:
    """The files of a source in the order of their names, with the format of each; and the offset of what follows.

    offset: the number of lines in the files of the sources before. seen: the names of files by device and inode, which
    gets those of this source. Raises UserError for a source that cannot be read or has a file that is in `seen`.
    """
    opened: list[RowsFile] = []
    for file in find_files(source):
        shown = shown_name(file, source)
        status = file.stat()
        if other := seen.get((status.st_dev, status.st_ino)):
            also = "" if other == shown else f", also as {other}"
            raise UserError(
                f"data.source has {shown} twice{also}: remove one; with `weight: 2`, each row is used twice"
            )
        seen[status.st_dev, status.st_ino] = shown
        kind, compression = file_kind(file)
        if kind in LINES and not compression:
            path, unit = file, "line"
            with file.open("rb") as plain:
                check_beginning(plain.read(8), shown)
        else:
            path = folder / f"{offset}.jsonl"
            unit = write_lines(file, kind, compression, path)
        first = first_row(path, f"{shown} {unit}")
        if first is None:
            raise UserError(f"{shown} holds no rows")
        line, values = first
        form = detect(values, source.format or "auto", source.columns or {}, f"{shown} {unit} {line}")
        print(f"{shown}: {form}{not_used(values, form)}", flush=True)
        opened.append(RowsFile(path, form, offset, shown, unit, sha256(file), number, source.weight, source.rows))
        offset += count_lines(path)
    return opened, offset


def find_files(source: DataSource) -> list[Path]:
    """The data files of a source, downloaded if it is on the hub."""
    parsed = parse_source(source.source)
    if parsed.scheme == "hf":
        files = hub_files(parsed, source)
    elif parsed.path.is_dir():
        files = files_of_folder(parsed.path)
    elif parsed.path.is_file():
        files = [parsed.path]
    elif parsed.path.exists() or parsed.path.is_symlink():
        raise UserError(f"data.source: {parsed.path} is a pipe, a device or a link to nothing: name a file or a folder")
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


def files_of_folder(folder: Path) -> list[Path]:
    """The data files in a folder and those below it, sorted.

    Hidden files and those of other kinds are left out, and some named. Raises UserError for a link to a folder, into
    which DVC does not look, and for a data file that is not a regular file.
    """
    files, left_out = [], []
    for root, folders, names in os.walk(folder, onerror=_raise):
        for name in folders:
            if (path := Path(root, name)).is_symlink():
                raise UserError(
                    f"data.source: {path} is a link to a folder, in which DVC would not notice a change: move the "
                    "folder there, or name it as a further source"
                )
        left_out += [Path(root, name) for name in folders if name.startswith(".")]
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(root, name) for name in names):
            if path.name.startswith(".") or file_kind(path)[0] not in KINDS:
                left_out.append(path)
            elif not path.is_file():
                raise UserError(f"data.source: {path} is a pipe, a device or a link to nothing: remove or repair it")
            else:
                files.append(path)
    if not files:
        raise UserError(f"data.source: {folder} holds no data files ({', '.join(KINDS)})")
    if left_out:
        some = ", ".join(ascii(str(path))[1:-1] for path in sorted(left_out)[:3])
        print(f"{folder}: {len(left_out)} files or folders are hidden or not data, and left out: {some}", flush=True)
    return sorted(files)


def _raise(error: OSError) -> None:
    raise error


def not_used(values: Any, form: RowFormat) -> str:
    """What to say of a file's columns that its format does not use."""
    names = [ascii(name)[1:-1] for name in values if name not in form.columns.values()]
    return f"; not used: {', '.join(names)}" if names else ""


def shown_name(file: Path, source: DataSource) -> str:
    """What messages call a file: for one of the hub, not where this machine's cache has it.

    Raises UserError for a name that cannot be printed in a line.
    """
    if re.search("[\\0-\x1f\x7f\ud800-\udfff]", str(file)):
        raise UserError(f"data.source: rename {str(file)!a}, whose name has characters that cannot be printed")
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


def first_row(path: Path, shown: str) -> tuple[int, Any] | None:
    """The number and the value of the first line that is not empty; None if there is none."""
    for number, line in numbered_lines(path, shown):
        if content := stripped(line, number):
            return number, parse_line(content, f"{shown} {number}")
    return None


def count_lines(path: Path) -> int:
    """The number of lines of a file, also if the last one has no line end."""
    lines, block = 0, b"\n"
    with path.open("rb") as file:
        while read := file.read(BLOCK):
            block = read
            lines += block.count(b"\n")
    return lines + (not block.endswith(b"\n"))
