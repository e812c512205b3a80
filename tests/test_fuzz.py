"""Any content of a params file or a rows file gives a value, or an error of one line that names the problem."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import ROOT
from support.rows import rows_of

from trnlora.data.prompt_template import TemplateText
from trnlora.errors import UserError
from trnlora.params import Params, load_params
from trnlora.readers import read_json, read_json_as, read_jsonl
from trnlora.training.adapter_record import (
    GREEDY,
    AdapterRecord,
    BaseModelRecord,
    DataFile,
    DataRecord,
    params_digest,
)

EXAMPLES = 300  # per test; takes a second or two
fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

DIGEST = "0" * 64
RECORD_JSON = AdapterRecord(
    format=1,
    template=TemplateText(name="dolly", jinja="{{ messages }}"),
    base_model=BaseModelRecord(source="hf://org/name", revision="main", sha256={"model.safetensors": DIGEST}),
    data=DataRecord(files=[DataFile(file="rows.jsonl", sha256=DIGEST)], prepared_sha256=DIGEST),
    params={"train": {"lr": 0.001}},
    params_sha256=params_digest({"train": {"lr": 0.001}}),
    generation=GREEDY,
).model_dump_json()
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


@st.composite
def changed_record(draw: st.DrawFn) -> bytes:
    """A valid trnlora.json with an arbitrary value at some key."""
    record: dict[str, Any] = json.loads(RECORD_JSON)
    inner = record
    while True:
        key = draw(st.sampled_from(sorted(inner)))
        if not isinstance(inner[key], dict) or not inner[key] or draw(st.booleans()):
            inner[key] = draw(VALUES)
            return json.dumps(record).encode()
        inner = inner[key]


def value_or_line(read: Callable[[Path], Any], path: Path, content: bytes) -> Any:
    """The value that `read` returns for the content, or None after a UserError of one line that names the file."""
    path.write_bytes(content)
    try:
        return read(path)
    except UserError as error:
        (line,) = str(error).splitlines()
        assert path.name in line
        return None


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


@fuzz
@given(content=SOUP | broken(ROWS) | changed_rows())
@example(content=b"9" * 5000)
@example(content=b"[" * 5000)
def test_what_stages_leave(path: Path, content: bytes) -> None:
    rows = value_or_line(read_jsonl, path, content)
    assert rows is None or all(isinstance(row, dict) for row in rows)
    value_or_line(read_json, path, content)


@fuzz
@given(content=SOUP | broken(RECORD_JSON.encode()) | changed_record())
@example(content=RECORD_JSON.replace("0.001", '"\\ud800"').encode())
@example(content=RECORD_JSON.replace("{{ messages }}", "\\ud800").encode())
@example(content=b"[" * 5000)
def test_records_of_adapters(path: Path, content: bytes) -> None:
    record = value_or_line(lambda file: read_json_as(file, AdapterRecord), path, content)
    assert record is None or str(record.template) + str(record.base_model) + str(record.generation)
