"""Any content of a params file or a rows file gives a value, or an error of one line that names the problem."""

import bz2
import csv
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
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import ROOT
from support.rows import rows_of

from trnlora.data import file_content
from trnlora.data.template_checks import check_template
from trnlora.data.templates import load_template
from trnlora.errors import UserError
from trnlora.params import Params, load_params
from trnlora.readers import read_json, read_jsonl

EXAMPLES = 300  # per test; takes a second or two
MANY = 20_000  # in `make test-long`
fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

PARAMS = (ROOT / "profiles/smollm2-135m-cpu.yaml").read_bytes()
ROWS = b"".join((ROOT / "data/tasks.jsonl").read_bytes().splitlines(keepends=True)[:3])

# Parts that parsers treat specially. The tests mix them with random text.
PIECES = [
    *("{", "}", "[", "]", '"', "'", ":", ": ", ",", "- ", "\n", "\n  ", "\t", "\0", "#", "|", ">", "&a ", "*a", "? "),
    *("!!bool x", "!!timestamp x", "!!int x", "!!binary x", "!!set {a}", "!!python/name:os.system ", "<<: *a", "---\n"),
    *("null", "true", "~", "1e-4", "-1", "0x1f", "1_0", "0b", ".inf", ".nan", "NaN", "Infinity", "-0.0", "2026-13-01"),
    *("\\u0000", "\\ud800", "\ufeff", "\u2028", "\x85", "é", "가", "9" * 5000, "0x" + "f" * 5000, "1" + "e9" * 3),
]  # fmt: skip
CHUNKS = st.one_of(st.sampled_from(PIECES).map(str.encode), st.text(max_size=8).map(str.encode), st.binary(max_size=8))
SOUP = st.lists(CHUNKS, max_size=12).map(b"".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(PIECES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def broken(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` with a part of it replaced."""
    begin = draw(st.integers(0, len(content)))
    end = draw(st.integers(begin, min(len(content), begin + 40)))
    return content[:begin] + draw(SOUP) + content[end:]


@st.composite
def changed_params(draw: st.DrawFn) -> bytes:
    """Valid YAML with the right keys, one of them with an arbitrary value."""
    params = yaml.safe_load(PARAMS)
    section = draw(st.sampled_from(sorted(params)))
    if isinstance(params[section], dict) and draw(st.booleans()):
        params[section][draw(st.sampled_from(sorted(params[section])) | st.text(max_size=8))] = draw(VALUES)
    else:
        params[section] = draw(VALUES)
    return yaml.safe_dump(params).encode()


@st.composite
def changed_rows(draw: st.DrawFn) -> bytes:
    """Lines of valid JSON, one of them with an arbitrary value in some column."""
    rows: list[Any] = [json.loads(line) for line in ROWS.splitlines()]
    column = draw(st.sampled_from([*rows[1], "other"]))
    rows[1] = draw(VALUES) if draw(st.booleans()) else rows[1] | {column: draw(VALUES)}
    return "\n".join(json.dumps(row) for row in rows).encode()


def value_or_line(read: Callable[[Path], Any], path: Path, content: bytes) -> Any:
    """The value that `read` returns for the content, or None after a UserError of one line that names the file."""
    path.write_bytes(content)
    try:
        return read(path)
    except UserError as error:
        (line,) = str(error).splitlines()
        assert path.name in line
        return None


@pytest.fixture(scope="module")
def tiny_tokenizer(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "fuzzed"


@fuzz
@given(content=SOUP | broken(PARAMS) | changed_params())
@example(content=b"[" * 5000)
@example(content=b"a: &a [*a]\nb: *a")
@example(content=PARAMS.replace(b"epochs: 2", b"epochs: -0x" + b"f" * 5000))
@example(content=PARAMS.replace(b"epochs: 2", b'epochs: "a\\nb"'))
def test_params(path: Path, content: bytes) -> None:
    params = value_or_line(load_params, path, content)
    assert params is None or isinstance(params, Params)


@fuzz
@given(content=SOUP | broken(ROWS) | changed_rows())
@example(content=b'{"instruction": ' + b"9" * 5000 + b"}")
@example(content=b"[" * 5000)
@example(content=b'{"instruction": ' + b"[" * 900 + b"]" * 900 + b"}")
def test_rows(path: Path, content: bytes) -> None:
    rows = value_or_line(rows_of, path, content)
    assert rows is None or all(row.messages[-1].content for row in rows)


def as_kind(content: bytes, name: str) -> bytes:
    """Rows in JSON Lines as a file of another kind, by its name."""
    rows = [json.loads(line) for line in content.splitlines()]
    if name == "a.json":
        return json.dumps(rows).encode()
    out = io.BytesIO()
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), out)
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0], delimiter="\t" if ".tsv" in name else ",")
        writer.writeheader()
        writer.writerows(rows)
        out.write(text.getvalue().encode())
    plain = out.getvalue()
    if name.endswith(".gz"):
        return gzip.compress(plain)
    if name.endswith(".bz2"):
        return bz2.compress(plain)
    return lzma.compress(plain) if name.endswith(".xz") else plain


KINDS = {
    name: as_kind(ROWS, name) for name in ("a.json", "a.csv", "a.tsv", "a.csv.gz", "a.csv.bz2", "a.csv.xz", "a.parquet")
}


def check_kind(folder: Path, name: str, content: bytes) -> None:
    """Reading gives the rows of the whole file, fewer or changed texts where the format cannot tell, or one line."""
    rows = value_or_line(rows_of, folder / name, content)
    assert rows is None or all(row.messages[-1].content is not None for row in rows)


@pytest.mark.parametrize("name", KINDS)
@settings(fuzz, max_examples=50)
@given(data=st.data())
def test_files_of_every_kind(tmp_path: Path, name: str, data: st.DataObject) -> None:
    check_kind(tmp_path, name, data.draw(SOUP | broken(KINDS[name])))


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", KINDS)
@settings(fuzz, max_examples=MANY)
@given(data=st.data())
def test_files_of_every_kind_for_long(tmp_path: Path, name: str, data: st.DataObject) -> None:
    check_kind(tmp_path, name, data.draw(SOUP | broken(KINDS[name])))


@pytest.mark.parametrize("name", ["a.csv.gz", "a.csv.bz2", "a.csv.xz"])
@settings(fuzz, max_examples=100)
@given(data=st.data())
def test_a_damaged_archive_is_never_read_as_whole(tmp_path: Path, name: str, data: st.DataObject) -> None:
    """Cut anywhere, or with bytes behind it: all of them have a checksum, and none ends early in silence."""
    whole = KINDS[name]
    content = data.draw(
        st.integers(1, len(whole) - 1).map(lambda end: whole[:end])
        | st.binary(min_size=1, max_size=20).filter(lambda more: more.strip(b"\0")).map(lambda more: whole + more)
    )
    assert value_or_line(rows_of, tmp_path / name, content) is None


@settings(fuzz, max_examples=200)
@given(value=st.lists(VALUES, max_size=6), block=st.integers(1, 40))
def test_arrays_are_read_as_json_reads_them(path: Path, value: list[Any], block: int) -> None:
    text = json.dumps(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_content, "BLOCK", block)
        found = list(file_content.array_rows(io.StringIO(text), path))
    assert json.dumps(found) == text


JINJA = [
    *(
        "{% for m in messages %}",
        "{% endfor %}",
        "{{ m.content }}",
        "{{ eos_token }}",
        "{% if x %}",
        "{% endif %}",
        "{%",
    ),
    *(
        "%}",
        "{{",
        "}}",
        "{#",
        "#}",
        " x ",
        "|random",
        "range(9)",
        "'",
        "**",
        "9" * 30,
        "namespace()",
        "m",
        ".",
        "[",
        "]",
    ),
]


@settings(fuzz, max_examples=25)
@given(jinja=st.lists(st.sampled_from(JINJA) | st.text(max_size=3), max_size=12).map("".join))
def test_templates(path: Path, tiny_tokenizer: Any, jinja: str) -> None:
    value_or_line(
        lambda file: check_template(load_template(f"path://{file}", {}, tiny_tokenizer), {}, tiny_tokenizer),
        path,
        jinja.encode(errors="replace"),
    )


@fuzz
@given(content=SOUP | broken(ROWS) | changed_rows())
@example(content=b"9" * 5000)
@example(content=b"[" * 5000)
def test_what_stages_leave(path: Path, content: bytes) -> None:
    rows = value_or_line(read_jsonl, path, content)
    assert rows is None or all(isinstance(row, dict) for row in rows)
    value_or_line(read_json, path, content)
