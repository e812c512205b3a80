"""Files of every kind that people have, read to the same rows."""

import bz2
import csv
import datetime
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.rows import open_file, rows_of

from trnlora.data.formats import Message, Row
from trnlora.errors import UserError

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
        ("rows.jsonl.gz", gzip.compress(as_lines(ROWS))[:60], "rows.jsonl.gz cannot be read: Compressed file ended"),
        ("rows.jsonl.zst", b"not zstd", "rows.jsonl.zst cannot be read: ZSTD decompress failed"),
        ("rows.jsonl.zst", zstd(as_lines(ROWS))[:-4], "rows.jsonl.zst cannot be read: Truncated compressed stream"),
        ("rows.json", b'[{"instruction": "a", "output": "b"}, {"inst', "rows.json is not valid JSON"),
        ("rows.json", b"[]", "rows.json holds no rows"),
        ("rows.csv", b"", "rows.csv must begin with the names of its columns"),
        ("rows.csv", b"instruction,output\na\n", r'rows.csv row 1 has 1 values for 2 columns: \["a"\]'),
        ("rows.csv", b"instruction,output\na,b\nc,d,e\n", "rows.csv row 2 has 3 values for 2 columns"),
        ("rows.csv", b"instruction,instruction\na,b\n", "rows.csv must begin with the names of its columns, each once"),
        ("rows.csv", b'instruction,output\n"a,b\n', "rows.csv line .* cannot be read"),
        ("rows.csv", b"instruction,output\n\xff,b\n", "rows.csv line .* cannot be read"),
        ("rows.parquet", b"PAR1", "rows.parquet cannot be read"),
        ("rows.parquet.gz", b"PAR1", "rows.parquet.gz is a compressed Parquet file"),
        (
            "rows.parquet",
            as_parquet([{"instruction": "a", "output": datetime.date(2024, 6, 8)}]),
            "rows.parquet row 1 holds a value that is not text: Object of type date",
        ),
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


def test_a_checksum_is_of_one_file(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).write_bytes(as_lines(ROWS))
    with pytest.raises(UserError, match=r"sha256 is that of one file, but .* holds 2: set"):
        open_file(folder, sha256="0" * 64)
