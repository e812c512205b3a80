"""Reading rows: errors for bad lines, and sources on disk and on the hub."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trnlora.data.examples import PreparedExample, read_examples
from trnlora.data.rows import Row, chunks, fetch_rows_file, read_jsonl_rows
from trnlora.data.split import read_split_keys
from trnlora.errors import UserError
from trnlora.files import sha256, write_jsonl


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
        (line(response=" \n"), "line 2: response is empty"),
        (line(category=""), "line 2: category is empty"),
        (line(response="\ud800"), "line 2: response contains half of a surrogate pair"),
        (line(split="dev"), 'line 2: split must be train or test, but it is "dev"'),
        (line(split=None), "line 2: split must be train or test, but it is null"),
        (line(split="test"), "line 1 has no column 'split', but other lines do"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, bad: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line() + b"\n" + bad + b"\n" + line() + b"\n")
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))} {message}"):
        read_split_keys(path, seed=17)


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_a_file_without_rows(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="holds no rows"):
        read_split_keys(path, seed=17)


def test_byte_order_marks_and_unusual_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    # U+2028 ends a line for str.splitlines, but not in JSON Lines.
    text = json.dumps(
        {"instruction": " a\u2028b\n", "context": "", "response": "한국어", "category": "c", "id": 7},
        ensure_ascii=False,
    )
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n\r\n" + line())
    rows = read_jsonl_rows(path)
    assert rows == [Row(1, "a\u2028b", "", "한국어", "c", None), Row(3, "Say it.", "", "it", "talk", None)]


def test_path_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "in" / "rows.jsonl"
    path.parent.mkdir()
    path.write_bytes(line())
    monkeypatch.chdir(tmp_path)
    assert fetch_rows_file(f"path://{path}", None) == path
    assert fetch_rows_file("path://in/rows.jsonl", sha256(path)) == Path("in/rows.jsonl")
    with pytest.raises(UserError, match=rf"rows.jsonl has sha256 {sha256(path)}, but data.sha256 pins 000"):
        fetch_rows_file("path://in/rows.jsonl", "0" * 64)
    for missing in ("path://rows.jsonl", "path://in"):
        with pytest.raises(UserError, match=rf"is not a file; path:// is relative to {tmp_path}"):
            fetch_rows_file(missing, None)


@pytest.fixture
def hub() -> Iterator[http.server.ThreadingHTTPServer]:
    """A Hugging Face Hub that answers the three requests of a download. Every data set on it has `.files`.

    org/gated requires the token `let-me-in`, as gated repositories do.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if "org/gated/" in self.path and self.headers["Authorization"] != "Bearer let-me-in":
                self.answer(403, b"gated", {"X-Error-Code": "GatedRepo"})
            elif re.match(r"/api/datasets/org/\w+/revision/v1$", self.path):
                self.answer(200, json.dumps({"id": "org/name", "sha": "a" * 40, "siblings": []}).encode())
            elif re.match(rf"/api/datasets/org/\w+/tree/{'a' * 40}", self.path):
                files = self.server.files.items()  # type: ignore[attr-defined]
                tree = [{"type": "file", "path": name, "size": len(f), "oid": "b" * 40} for name, f in files]
                self.answer(200, json.dumps(tree).encode())
            elif found := re.match(rf"/datasets/org/\w+/resolve/{'a' * 40}/(.+)$", self.path):
                content = self.server.files[found[1]]  # type: ignore[attr-defined]
                self.answer(200, content, {"ETag": '"' + "b" * 40 + '"', "X-Repo-Commit": "a" * 40})
            else:
                self.answer(404, b"no such revision", {"X-Error-Code": "RevisionNotFound"})

        do_HEAD = do_GET

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files = {"README.md": b"# rows", "rows.jsonl": line() + b"\n"}  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def fetch_in_a_process(source: str, port: int, home: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run fetch_rows_file in a process of its own, since huggingface_hub reads the hub's address when imported."""
    code = (
        "import sys\nfrom trnlora.data.rows import fetch_rows_file\nfrom trnlora.errors import run\n"
        "run(lambda: print(fetch_rows_file(sys.argv[1], None)))"
    )
    unset = ("HF_TOKEN", "HF_HUB_OFFLINE")
    base = {key: value for key, value in os.environ.items() if key not in unset}
    return subprocess.run(
        [sys.executable, "-c", code, source],
        env={**base, "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home), **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_hub_source(tmp_path: Path, hub: Any) -> None:
    done = fetch_in_a_process("hf://org/name@v1", hub.server_port, tmp_path)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert path.name == "rows.jsonl"
    assert read_jsonl_rows(path)[0].response == "it"


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
    done = fetch_in_a_process(source, hub.server_port, tmp_path, **({"HF_TOKEN": token} if token else {}))
    if message:
        assert done.returncode == 1
        assert re.fullmatch(rf"error: .*{message}.*\n", done.stderr), done.stderr
    else:
        assert done.returncode == 0, done.stderr
    assert "let-me-in" not in done.stdout + done.stderr


def test_a_hub_data_set_of_several_files(tmp_path: Path, hub: Any) -> None:
    hub.files = {"a.jsonl": line(), "more/b.jsonl": line()}
    done = fetch_in_a_process("hf://org/name@v1", hub.server_port, tmp_path)
    assert done.returncode == 1
    assert "must hold exactly one .jsonl file, but it holds a.jsonl, b.jsonl" in done.stderr


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
    found = chunks(path, size)
    assert [row for chunk in found for row in read_jsonl_rows(path, chunk)] == read_jsonl_rows(path)
    assert (len(found) == 1) == (size == 10_000)


def test_prepared_examples_have_all_their_keys(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    example: PreparedExample = {
        "id": 1,
        "category": "talk",
        "instruction": "Say it.",
        "context": "",
        "response": "it",
        "prompt": "Say it: ",
        "prompt_token_ids": [1, 2],
        "response_token_ids": [3],
    }
    whole = dict(example)
    write_jsonl(path, [whole])
    assert read_examples(path) == [example]
    write_jsonl(path, [whole, {"id": 2, **{key: value for key, value in whole.items() if key.startswith("prompt")}}])
    with pytest.raises(UserError, match=r"test\.jsonl line 2 has no category, context, instruction, response, resp"):
        read_examples(path)
