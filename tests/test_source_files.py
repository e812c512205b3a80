"""Files of every kind that people have, read to the same rows."""

import bz2
import csv
import datetime
import gzip
import io
import json
import lzma
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.rows import open_file, rows_of

from trnlora.data import file_content, rows
from trnlora.data.formats import Message, Row
from trnlora.data.source_files import open_sources
from trnlora.errors import UserError
from trnlora.params import DataSource

# What a loader that guesses types would lose: numbers, dates, "NA", line breaks, quotes, scripts, a line separator.
TEXTS = [
    ("007", "NA"),
    ("2024-06-08", "null"),
    ('say "hi", then\nleave', "1e5"),
    ("한국어로 답하세요", "네, 그럴게요"),
    ("قل مرحبا", "مرحبا"),
    ("a\u2028b", "true"),
]
ROWS = [{"instruction": question, "output": answer} for question, answer in TEXTS]
EXPECTED = [
    Row(number, (Message("user", question), Message("assistant", answer)), "all", None)
    for number, (question, answer) in enumerate(TEXTS, 1)
]


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_csv(rows: list[dict[str, Any]], separator: str = ",") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def zstd(content: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as file:
        file.write(content)
    compressed: bytes = out.getvalue().to_pybytes()
    return compressed


def repeated_column() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["output", "output"]), out)
    return out.getvalue()


BOM = b"\xef\xbb\xbf"
FILES: dict[str, Callable[[], bytes]] = {
    "rows.jsonl": lambda: as_lines(ROWS),
    "rows.ndjson": lambda: as_lines(ROWS),
    "crlf.jsonl": lambda: BOM + as_lines(ROWS).replace(b"\n", b"\r\n"),
    "lines.json": lambda: as_lines(ROWS),
    "array.json": lambda: json.dumps(ROWS, indent=2).encode(),
    "bom.json": lambda: BOM + b" \n" + json.dumps(ROWS).encode(),
    "rows.csv": lambda: as_csv(ROWS),
    "bom.csv": lambda: BOM + as_csv(ROWS),
    "rows.tsv": lambda: as_csv(ROWS, "\t"),
    "rows.parquet": lambda: as_parquet(ROWS),
    "rows.jsonl.gz": lambda: gzip.compress(as_lines(ROWS)),
    "rows.json.bz2": lambda: bz2.compress(json.dumps(ROWS).encode()),
    "rows.csv.xz": lambda: lzma.compress(as_csv(ROWS)),
    "rows.jsonl.zst": lambda: zstd(as_lines(ROWS)),
    "rows.csv.zst": lambda: zstd(as_csv(ROWS)),
    "bom.json.zst": lambda: zstd(BOM + json.dumps(ROWS).encode()),
    "frames.jsonl.zst": lambda: b"".join(zstd(as_lines([row])) for row in ROWS),  # as pzstd writes it
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name]())
    assert rows_of(path) == EXPECTED


def test_nested_lists_of_parquet(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]
    path = tmp_path / "rows.parquet"
    path.write_bytes(as_parquet([{"messages": chat}, {"messages": chat * 2}]))
    assert [len(row.messages) for row in rows_of(path)] == [2, 4]


def test_a_folder_of_shards_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "more").mkdir(parents=True)
    (folder / "b.csv").write_bytes(as_csv(ROWS[2:4]))
    (folder / "a.jsonl").write_bytes(as_lines(ROWS[:2]))
    (folder / "more" / "c.parquet").write_bytes(as_parquet(ROWS[4:]))
    (folder / "README.md").write_text("Not data.")
    assert rows_of(folder) == EXPECTED


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.txt", b"a", "rows.txt is not a data file: .jsonl, .ndjson, .json, .csv, .tsv, .parquet"),
        ("rows.jsonl.gz", b"not gzip", "rows.jsonl.gz cannot be read: Not a gzipped file"),
        ("rows.jsonl.gz", gzip.compress(as_lines(ROWS)) + b"more", "rows.jsonl.gz cannot be read: Not a gzipped file"),
        (
            "rows.jsonl.bz2",
            bz2.compress(as_lines(ROWS)) + b"more",
            "rows.jsonl.bz2 cannot be read: Invalid data stream",
        ),
        ("rows.jsonl.bz2", bz2.compress(as_lines(ROWS))[:-9], "rows.jsonl.bz2 cannot be read: Compressed file ended"),
        (
            "rows.jsonl.xz",
            lzma.compress(as_lines(ROWS)) + b"more",
            "rows.jsonl.xz cannot be read: Compressed file ended",
        ),
        ("rows.jsonl.xz", lzma.compress(as_lines(ROWS))[:-9], "rows.jsonl.xz cannot be read: Compressed file ended"),
        ("rows.jsonl.zst", zstd(as_lines(ROWS)) + b"more", "rows.jsonl.zst cannot be read: ZSTD decompress failed"),
        ("rows.jsonl", gzip.compress(as_lines(ROWS)), "rows.jsonl is compressed with gzip: name it .gz too"),
        ("rows.csv", lzma.compress(as_lines(ROWS)), "rows.csv is compressed with xz"),
        ("rows.json.gz", gzip.compress(as_parquet(ROWS)), "rows.json.gz is a Parquet file: name it .parquet"),
        ("rows.jsonl", as_lines(ROWS).decode().encode("utf-16"), "rows.jsonl is UTF-16 text: save it as UTF-8"),
        ("rows.jsonl.gz", gzip.compress(as_lines(ROWS))[:60], "rows.jsonl.gz cannot be read: Compressed file ended"),
        ("rows.jsonl.zst", b"not zstd", "rows.jsonl.zst cannot be read: ZSTD decompress failed"),
        ("rows.jsonl.zst", zstd(as_lines(ROWS))[:-4], "rows.jsonl.zst cannot be read: Truncated compressed stream"),
        ("rows.json", b'[{"instruction": "a", "output": "b"}, {"inst', "rows.json row 2 is not valid JSON"),
        (
            "rows.json",
            b'[{"instruction": "a", "output": "b"} 7]',
            r'row 2 is not valid JSON \("7" where , or \] belongs',
        ),
        ("rows.json", b'[{"instruction": "a", "output": "b"}', r"row 2 is not valid JSON \(the array does not end"),
        ("rows.json", b'[{"instruction": "a", "output": "b"}] [', r'row 2 is not valid JSON \("\[" follows the array'),
        ("rows.json", b"[" * 100_000, r"rows.json row 1 is not valid JSON \(nested too deeply"),
        ("rows.json", b'[{"instruction": "\xff"}]', "rows.json row 1 is not valid JSON .*invalid start byte"),
        ("rows.json", b'[{"a": 1, "a": 2}]', r'rows.json row 1 is not valid JSON \(the key "a" is there twice'),
        ("rows.jsonl", b'{"a": 1, "a": 2}', r'rows.jsonl line 1 is not valid JSON \(the key "a" is there twice'),
        (
            "rows.json",
            b'[{"instruction": "\\ud800", "output": "b"}]',
            "row 1: instruction contains half of a surrogate",
        ),
        ("rows.json", b"[]", "rows.json holds no rows"),
        ("rows.csv", b"", "rows.csv must begin with the names of its columns"),
        ("rows.csv", b"instruction,output\na\n", r'rows.csv row 1 has 1 values for 2 columns: \["a"\]'),
        ("rows.csv", b"instruction,output\na,b\nc,d,e\n", "rows.csv row 2 has 3 values for 2 columns"),
        ("rows.csv", b"instruction,instruction\na,b\n", "rows.csv must begin with the names of its columns, each once"),
        ("rows.csv", b'instruction,output\n"a,b\n', "rows.csv line .* cannot be read"),
        ("rows.csv", b"instruction,output\n\xff,b\n", r"rows.csv is not valid UTF-8 after line .* \(.*, byte 0xff\)"),
        ("rows.parquet", b"PAR1", "rows.parquet cannot be read"),
        ("rows.parquet.gz", b"PAR1", "rows.parquet.gz is a compressed Parquet file"),
        (
            "rows.parquet",
            as_parquet([{"instruction": "a", "output": datetime.date(2024, 6, 8)}]),
            r'rows.parquet row 1: output must be a string, but it is \{"date": "datetime.date',
        ),
        (
            "rows.parquet",
            as_parquet([{"instruction": "a", "output": b"b"}]),
            r'rows.parquet row 1: output must be a string, but it is \{"bytes": ',
        ),
        ("rows.parquet", repeated_column(), "rows.parquet has a column twice"),
        (
            "rows.parquet",
            as_parquet([{"instruction": "a", "output": 7}]),
            "rows.parquet row 1: output must be a string",
        ),
        ("rows.json", b'[{"instruction": "a", "output": 7}]', "rows.json row 1: output must be a string, but it is 7"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # compressed content is not the same in each process
)
def test_a_bad_file_is_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        rows_of(path)
    assert "\n" not in str(caught.value)


def test_what_is_not_used_does_not_matter_and_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.parquet"
    more = {"when": datetime.datetime(2024, 6, 8), "score": float("nan"), "image": b"\xff"}
    path.write_bytes(as_parquet([row | more for row in ROWS]))
    assert rows_of(path) == EXPECTED
    assert "; not used: when, score, image\n" in capsys.readouterr().out


def test_arrays_larger_than_what_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.json").write_bytes(json.dumps(ROWS, indent=1, ensure_ascii=False).encode())
    for block in (1, 2, 7, 100):  # also in the middle of a number, which test_fuzz.py tries
        monkeypatch.setattr(file_content, "BLOCK", block)
        assert rows_of(tmp_path / "rows.json") == EXPECTED


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", as_lines(ROWS) + b'{"a": "' + b"a" * 5000, "line 7 is longer than"),
        ("rows.jsonl", b'{"a": "' + b"a" * 5000, "line 1 is longer than"),
        ("rows.csv", b'instruction,output\n"' + b"a" * 5000, "line 2 cannot be read: field larger than field limit"),
        ("rows.json", b'[{"a": "' + b"a" * 9000, "row 1 is not valid JSON"),
        ("rows.jsonl.gz", gzip.compress(b"a" * 500_000), "expands to more than 250 times its size"),
        ("rows.jsonl.xz", lzma.compress(b"a" * 500_000), "expands to more than 250 times its size"),
    ],
    ids=["long line", "long first line", "long field", "long element", "gzip bomb", "xz bomb"],
)
def test_what_is_larger_than_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, message: str
) -> None:
    """With smaller limits than the real ones."""
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 4000)
    monkeypatch.setattr(rows, "CHUNK_BYTES", 100)
    monkeypatch.setattr(file_content, "MAX_ROW_BYTES", 4000)
    monkeypatch.setattr(file_content, "BOMB_BYTES", 1000)
    monkeypatch.setattr(file_content, "BLOCK", 1000)
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} .*{message}"):
        rows_of(path)


def test_a_full_disk_is_noticed_before_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_content, "KEPT_FREE", 1 << 62)
    monkeypatch.setattr(file_content, "CHECK_EVERY", 10)
    (tmp_path / "rows.csv").write_bytes(as_csv(ROWS))
    with pytest.raises(UserError, match=r"rows.csv needs more temporary space than .* has: set TMPDIR"):
        rows_of(tmp_path / "rows.csv")


# What a folder may have beside a.jsonl, and what is said of it.
BESIDE: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (lambda folder: os.mkfifo(folder / "b.jsonl"), "b.jsonl is a pipe, a device or a link to nothing"),
    "link to nothing": (lambda folder: (folder / "b.csv").symlink_to("gone"), "b.csv is a pipe, a device or a link to"),
    "loop": (lambda folder: (folder / "b.csv").symlink_to("b.csv"), "b.csv is a pipe, a device or a link to nothing"),
    "link to a folder": (
        lambda folder: (folder / "b").symlink_to("/"),
        "b is a link to a folder, in which DVC would not notice a change",
    ),
    "link": (
        lambda folder: (folder / "b.jsonl").symlink_to("a.jsonl"),
        r"data.source has .*b.jsonl twice, also as .*a.js",
    ),
    "hard link": (
        lambda folder: os.link(folder / "a.jsonl", folder / "b.jsonl"),
        r"has .*b.jsonl twice, also as .*a.jso",
    ),
    "line break": (
        lambda folder: (folder / "b\n.csv").write_text("a"),
        r"rename '.*b\\n.csv', whose name has characters",
    ),
    "not UTF-8": (lambda folder: (folder / "b\udcff.csv").write_text("a"), r"rename '.*b\\udcff.csv', whose name has"),
    "empty": (
        lambda folder: (folder / "b.csv.gz").write_bytes(gzip.compress(b"")),
        "b.csv.gz must begin with the names",
    ),
}


@pytest.mark.parametrize("name", BESIDE)
def test_a_folder_with_something_odd_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(as_lines(ROWS))
    add, message = BESIDE[name]
    add(folder)
    with pytest.raises(UserError, match=message):
        open_file(folder)


def test_what_a_folder_has_beside_data_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    for name in ("a.jsonl", ".b.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", "c.txt", "d\udcff"):
        (folder / name).write_bytes(as_lines(ROWS))
    assert rows_of(folder) == EXPECTED
    printed = capsys.readouterr().out
    assert re.search(r"4 files or folders are hidden or not data, and left out: .*\.b\.jsonl, .*\.ipynb_ch", printed)


def test_a_pipe_or_device_is_no_source(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    for path in (tmp_path / "rows.jsonl", Path("/dev/zero")):
        with pytest.raises(UserError, match=r"is a pipe, a device or a link to nothing: name a file"):
            rows_of(path)


def test_a_source_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(as_lines(ROWS))
    for other in (tmp_path / "a.jsonl", tmp_path, tmp_path / ".." / tmp_path.name / "a.jsonl"):
        with pytest.raises(UserError, match=r"data.source has .*a.jsonl twice.*: remove one; with `weight: 2`"):
            open_sources([DataSource(source=f"path://{path}") for path in (tmp_path / "a.jsonl", other)], tmp_path)


def test_a_checksum_is_of_one_file(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).write_bytes(as_lines(ROWS))
    with pytest.raises(UserError, match=r"sha256 is that of one file, but .* holds 2: set"):
        open_file(folder, sha256="0" * 64)
