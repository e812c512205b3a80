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
from trnlora.data.prompt_template import TemplateText
from trnlora.data.template_checks import check_template
from trnlora.data.templates import load_template
from trnlora.errors import UserError
from trnlora.params import Params, check_params, load_params, read_mapping
from trnlora.preflight.doctor import run_checks
from trnlora.readers import read_json, read_json_as, read_jsonl, write_yaml
from trnlora.training.adapter_record import (
    GREEDY,
    AdapterRecord,
    BaseModelRecord,
    DataFile,
    DataRecord,
    params_digest,
)

EXAMPLES = 300  # per test; takes a second or two
MANY = 20_000  # in `make test-long`
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


def near(value: Any) -> st.SearchStrategy[Any]:
    """Values of the same type, which params may well hold."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.integers(min_value=1)
    if isinstance(value, float):
        return st.floats(min_value=0)
    names = st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=300)
    return names.map("path://{}".format) | st.sampled_from(["::1", "한국", "path://.", "path:///", "nxd", "cuda"])


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


# Scalars that YAML 1.1 and 1.2, or two parsers of one version, read differently.
SCALARS = st.sampled_from([
    *("010", "0o17", "0x1F", "0b11", "1_000", "1e4", "1e-4", "1.0e-4", ".5", "5.", "+1", "-0", "1:30", "190:20:30"),
    *("1e400", ".inf", "-.Inf", ".NaN", "yes", "No", "on", "OFF", "y", "N", "TRUE", "null", "Null", "~", "=", "<<"),
    *("2026-01-02", "2026-13-01", "2026-01-02T03:04:05Z", "'010'", '"yes"', "!!str 010", "!!int '3'", "!!float 3"),
    *("!!bool yes", "!!binary aGk=", "!!python/none ", "[010, yes]", "{a: on}", "|\n  010\n", ">-\n  yes\n", "1 # x"),
    *("x#y", "!foo x", "한국", "\ufeff1", "\x85", "\u2028", "\t1", "1\t", "'a''b'"),
]) | st.text(max_size=6) | st.floats().map(repr) | st.integers().map(str)  # fmt: skip
FRAMES = st.sampled_from([
    *("a: {}", "a: {}\n", "{{a: {}}}", "a: [{}]", "\ufeffa: {}", "---\na: {}", "a: {}\n---\nb: 1", "a: {0}\na: {0}"),
    *("%YAML 1.1\n---\na: {}", "a: &x {}\nb: *x", "x: &x {{a: {}}}\ny:\n  <<: *x", "a:\t{}", "\ta: {}", "? {}\n: 1"),
    "a:\r\n  b: {}\r\n",
])  # fmt: skip


def dvc_value(path: Path) -> Any:
    """What DVC reads from a params file; None where it refuses the file."""
    from dvc.utils.serialize import load_yaml

    try:
        return load_yaml(path) or None  # DVC takes an empty file for no params, which is refused here
    except Exception:
        return None


@fuzz
@given(content=st.builds(str.format, FRAMES, SCALARS).map(lambda text: text.encode(errors="replace")) | SOUP)
@example(content=PARAMS.decode().encode("utf-16"))
@example(content=b"a: \xff")
def test_the_params_that_a_stage_reads_are_those_that_dvc_reads(path: Path, content: bytes) -> None:
    """repr tells 1 from True, 1 from 1.0 and nan from all others."""
    read = value_or_line(read_mapping, path, content)
    assert read is None or repr(read) == repr(dvc_value(path))


@fuzz
@given(value=VALUES.filter(lambda value: "nan" not in repr(value)))
@example(value={":0": None})
def test_yaml_that_is_written_is_read_again(path: Path, value: Any) -> None:
    write_yaml({"a": value}, path)
    for read in (read_mapping(path), dvc_value(path)):
        assert json.dumps(read, sort_keys=True) == json.dumps({"a": value}, sort_keys=True)


PROFILE = load_params(ROOT / "profiles/smollm2-135m-cpu.yaml")
NAMES = [(name, key) for name, section in PROFILE if name != "backend" for key in type(section).model_fields]


@settings(fuzz, max_examples=100)
@given(data=st.data())
@example(data=None)
def test_doctor_prints_lines(path: Path, capsys: pytest.CaptureFixture[str], data: Any) -> None:
    """Whatever valid params hold: a check passes, or fails with a line."""
    values = PROFILE.model_dump()
    for _ in range(3 if data else 0):
        section, key = data.draw(st.sampled_from(NAMES))
        values[section][key] = data.draw(VALUES | near(values[section][key]))
    try:
        params = check_params(values, path)
    except UserError:
        return
    run_checks(params)
    assert all(line[0] in "✓✗!" for line in capsys.readouterr().out.splitlines())


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


@fuzz
@given(content=SOUP | broken(RECORD_JSON.encode()) | changed_record())
@example(content=RECORD_JSON.replace("0.001", '"\\ud800"').encode())
@example(content=RECORD_JSON.replace("{{ messages }}", "\\ud800").encode())
@example(content=b"[" * 5000)
def test_records_of_adapters(path: Path, content: bytes) -> None:
    record = value_or_line(lambda file: read_json_as(file, AdapterRecord), path, content)
    assert record is None or str(record.template) + str(record.base_model) + str(record.generation)
