"""Reading rows: errors for bad lines, and sources on disk and on the hub."""

import http.server
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.hub import Hub
from support.rows import open_file, question, rows_of

from trnlora.data.examples import PreparedExample, read_examples
from trnlora.data.rows import chunks, read_rows
from trnlora.data.source_files import find_files
from trnlora.data.split import read_split_keys
from trnlora.errors import UserError
from trnlora.files import sha256, write_jsonl
from trnlora.params import DataSource


def line(**changes: Any) -> bytes:
    """A valid row as JSON with some columns changed; 'absent' removes a column."""
    values = {"instruction": "Say it.", "context": "", "response": "it", "category": "talk", **changes}
    return json.dumps({key: value for key, value in values.items() if value != "absent"}).encode()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b'{"instruction": ', r"line 2 is not valid JSON \(.* at column 16\)"),
        (b'{"instruction": "\xff"}', "line 2 is not valid UTF-8 .* at byte 17"),
        (b'["a"]', "line 2 is not a JSON object with the columns instruction, context, response, category"),
        (b"[" * 100_000, r"line 2 is not valid JSON \(nested too deeply\)"),
        (line(context="absent"), r"line 2 has no column 'context'"),
        (line(response=["it"]), r'line 2: response must be a string, but it is \["it"\]'),
        (line(context=None), "line 2: context must be a string, but it is null"),
        (line(category=""), "line 2: category is empty"),
        (line(response="\ud800"), "line 2: response contains half of a surrogate pair"),
        (line(split="test"), "line 2 has a column 'split', but the first row has not: add it to all or none"),
        (
            line(response="a\U0010fffd"),
            "line 2: response contains U\\+10FFFD, a private-use character that is reserved",
        ),
    ],
    ids=lambda value: str(value[:40]),
)
def test_a_bad_line_is_named(tmp_path: Path, bad: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line() + b"\n" + bad + b"\n" + line() + b"\n")
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))} {message}"):
        read_split_keys(open_file(path), seed=17)


@pytest.mark.parametrize(("split", "shown"), [("dev", '"dev"'), (None, "null"), ("absent", "")])
def test_a_bad_value_of_the_column_split(tmp_path: Path, split: str | None, shown: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line(split="train") + b"\n" + line(split=split) + b"\n")
    expected = f"split must be train or test, but it is {shown}" if shown else "line 2 has no column 'split'"
    with pytest.raises(UserError, match=expected):
        rows_of(path)


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_a_file_without_rows(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="holds no rows"):
        read_split_keys(open_file(path), seed=17)


def test_byte_order_marks_and_unusual_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    # U+2028 ends a line for str.splitlines, but not in JSON Lines.
    text = json.dumps(
        {"instruction": " a\u2028b\n", "context": "", "response": "한국어", "category": "c", "id": 7},
        ensure_ascii=False,
    )
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n\r\n" + line())
    assert rows_of(path) == [question(1, "a\u2028b", "", "한국어", "c"), question(3, "Say it.", "", "it")]


def test_path_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "in" / "rows.jsonl"
    path.parent.mkdir()
    path.write_bytes(line())
    monkeypatch.chdir(tmp_path)
    assert find_files(DataSource(source=f"path://{path}")) == [path]
    assert find_files(DataSource(source="path://in/rows.jsonl", sha256=sha256(path))) == [Path("in/rows.jsonl")]
    with pytest.raises(UserError, match=rf"rows.jsonl has sha256 {sha256(path)}, but data.sha256 pins 000"):
        find_files(DataSource(source="path://in/rows.jsonl", sha256="0" * 64))
    with pytest.raises(UserError, match=rf"there is no rows.jsonl; path:// is relative to {tmp_path}"):
        find_files(DataSource(source="path://rows.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no data files"):
        find_files(DataSource(source="path://empty"))


PINNED = f"hf://org/name@{'a' * 40}"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub({"README.md": b"# rows", "rows.jsonl": line() + b"\n"}) as running:
        yield running


def fetch_in_a_process(
    source: str, port: int, home: Path, split: str = "", **env: str
) -> subprocess.CompletedProcess[str]:
    """Run find_files in a process of its own, since huggingface_hub reads the hub's address when imported."""
    code = (
        "import sys\nfrom trnlora.data.source_files import find_files\nfrom trnlora.errors import run\n"
        "from trnlora.params import DataSource\n"
        "run(lambda: print(*find_files(DataSource(source=sys.argv[1], split=sys.argv[2] or None)), sep='\\n'))"
    )
    unset = ("HF_TOKEN", "HF_HUB_OFFLINE")
    base = {key: value for key, value in os.environ.items() if key not in unset}
    return subprocess.run(
        [sys.executable, "-c", code, source, split],
        env={**base, "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home), **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_hub_source(tmp_path: Path, hub: Any) -> None:
    done = fetch_in_a_process("hf://org/name@v1", hub.port, tmp_path)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.splitlines()[-1])
    assert path.name == "rows.jsonl"
    assert rows_of(path)[0].messages[-1].content == "it"


@pytest.mark.parametrize(
    ("source", "token", "message"),
    [
        ("hf://org/name", "", "must have the form hf://org/name@revision"),
        ("hf://org/name@v2", "", "org/name has no revision v2"),
        ("hf://org/gated@v1", "", "org/gated is gated: accept its terms at .*/datasets/org/gated and set HF_TOKEN"),
        ("hf://org/gated@v1", "let-me-in", ""),
    ],
)
def test_a_refusal_of_the_hub_is_one_line(tmp_path: Path, hub: Any, source: str, token: str, message: str) -> None:
    done = fetch_in_a_process(source, hub.port, tmp_path, **({"HF_TOKEN": token} if token else {}))
    if message:
        assert done.returncode == 1
        assert re.fullmatch(rf"error: .*{message}.*\n", done.stderr), done.stderr
    else:
        assert done.returncode == 0, done.stderr
    assert "let-me-in" not in done.stdout + done.stderr


def test_a_hub_data_set_of_several_files(tmp_path: Path, hub: Any) -> None:
    hub.files = {"data/train-0.jsonl": line(), "data/train-1.jsonl": line(), "data/test.jsonl": line()}
    done = fetch_in_a_process(PINNED, hub.port, tmp_path)
    assert done.returncode == 1
    assert "has the splits train, test: name one, data.source: [{source: …, split: …}]" in done.stderr
    done = fetch_in_a_process(PINNED, hub.port, tmp_path, split="train")
    assert [Path(name).name for name in done.stdout.split()] == ["train-0.jsonl", "train-1.jsonl"]
    done = fetch_in_a_process(PINNED, hub.port, tmp_path, split="dev")
    assert "has no split dev: it has train, test" in done.stderr


def doctor(source: str, port: int) -> str:
    """What `make doctor` says of a data source, in a process of its own."""
    code = (
        "import sys\nfrom trnlora.errors import run\nfrom trnlora.preflight.doctor import check_hub_data\n"
        "from trnlora.sources import parse_source\nrun(lambda: print(check_hub_data(parse_source(sys.argv[1]))))"
    )
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{port}"}
    done = subprocess.run([sys.executable, "-c", code, source], env=env, capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).strip()


def test_a_newer_version_on_the_hub_is_said(tmp_path: Path, hub: Any) -> None:
    """A branch or tag is used as it was when it was downloaded; the hub's is named, to be written into params.yaml."""
    first = fetch_in_a_process("hf://org/name@v1", hub.port, tmp_path).stdout.splitlines()
    assert first[0] == f"hf://org/name@v1 is not pinned: this run uses org/name@{'a' * 40}"
    assert doctor(PINNED, hub.port) == "data org/name is pinned, and is the newest version"
    hub.newest = "b" * 40
    again = fetch_in_a_process("hf://org/name@v1", hub.port, tmp_path).stdout.splitlines()
    assert again == [f"{first[0]}; the hub has a newer one, {'b' * 40}", first[1]]
    assert doctor(PINNED, hub.port) == f"data org/name is pinned; the hub's main branch has changed, to {'b' * 40}"
    assert doctor("hf://org/name@v1", hub.port) == (
        f"error: data.source hf://org/name@v1 may change: write a commit in place of v1, which is now {'b' * 40}"
    )


def test_an_unreachable_hub_is_one_line(tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        port = server.server_port  # closed after the block, so it refuses connections
    done = fetch_in_a_process("hf://org/name@v1", port, tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(r"error: cannot reach the hub at .*\n", done.stderr), done.stderr


# Chunks and prepared examples


@pytest.mark.parametrize("size", [1, 100, 10_000])
def test_chunks_are_the_whole_file_in_complete_lines(tmp_path: Path, size: int) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(line(instruction=f"Say {number}.") for number in range(20)))  # no newline at the end
    (file,) = open_file(path)
    found = chunks(file, size)
    assert [row for chunk in found for row in read_rows(chunk)] == rows_of(path)
    assert (len(found) == 1) == (size == 10_000)


def test_prepared_examples_have_all_their_keys(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    example: PreparedExample = {
        "id": 1,
        "category": "talk",
        "messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "it"}],
        "prompt": "Say it: ",
        "token_ids": [1, 2, 3],
        "labelled": [[2, 3]],
    }
    whole = dict(example)
    write_jsonl(path, [whole])
    assert read_examples(path) == [example]
    write_jsonl(path, [whole, {"id": 2, **{key: value for key, value in whole.items() if key.startswith("prompt")}}])
    with pytest.raises(UserError, match=r"test\.jsonl line 2 has no category, labelled, messages, token_ids"):
        read_examples(path)
