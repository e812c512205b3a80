"""make smoke against a server that answers one of the models only: vllm-neuron may end with a failed request."""

import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.server import assert_one_line, script

from trnlora.data.examples import prompt_token_ids, read_examples
from trnlora.files import write_jsonl


class Api(http.server.BaseHTTPRequestHandler):
    """The two requests of smoke. `fails`: what the server does with a model's requests."""

    served: tuple[str, ...] = ("base", "tuned")
    prompt_token_ids: list[int] | None = None  # what the server says that it made of the messages
    fails: dict[str, str]
    asked: list[str]
    bodies: list[dict[str, Any]]

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": name} for name in ("no-adapter", *self.served)]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        model = body["model"]
        self.asked.append(model)
        self.bodies.append(body)
        if self.fails.get(model) == "dies":
            return  # without a reply
        if self.fails.get(model) == "refuses":
            self.reply(500, {"error": {"message": "EngineCore encountered an issue."}})
        else:
            choices = [{"message": {"content": f"I am {model}."}}]
            self.reply(200, {"choices": choices, "prompt_token_ids": self.prompt_token_ids})

    def reply(self, status: int, body: Any) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def api() -> Iterator[type[Api]]:
    class Handler(Api):
        fails: dict[str, str] = {}  # noqa: RUF012 (of this test)
        asked: list[str] = []  # noqa: RUF012
        bodies: list[dict[str, Any]] = []  # noqa: RUF012

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        Handler.port = server.server_port  # type: ignore[attr-defined]
        yield Handler
        server.shutdown()


def smoke(api: Any, workdir: Path) -> Any:
    return script("tools/smoke.py", "--question", "Who are you?", "--port", str(api.port), cwd=workdir)


def test_tuned_is_asked_first(api: type[Api], workdir: Path) -> None:
    done = smoke(api, workdir)
    assert done.returncode == 0, done.stderr
    assert api.asked == ["tuned", "base"]
    assert "I am tuned." in done.stdout
    assert "I am base." in done.stdout


@pytest.mark.parametrize(
    ("model", "how", "line"),
    [
        ("base", "refuses", "base failed: the server at"),
        ("base", "dies", "base failed, and the server with it: no server answers"),
        ("tuned", "refuses", "tuned failed: "),
    ],
)
def test_the_line_names_the_model_that_failed_and_the_other_answer_is_shown(
    api: type[Api], workdir: Path, model: str, how: str, line: str
) -> None:
    api.fails[model] = how
    done = smoke(api, workdir)
    assert_one_line(done)
    assert f"error: {line}" in done.stderr
    (other,) = {"base", "tuned"} - {model}
    assert f"I am {other}." in done.stdout
    assert f"I am {model}." not in done.stdout


def test_a_merged_model_is_asked_alone(api: type[Api], workdir: Path) -> None:
    api.served = ("tuned",)
    done = smoke(api, workdir)
    assert done.returncode == 0, done.stderr
    assert api.asked == ["tuned"]


def test_the_first_test_row_is_asked_with_the_template_of_the_rows_and_the_servers_sampling(
    api: type[Api], evaluated: Path, tmp_path: Path
) -> None:
    """The heading of the context is dolly's, as prepared.json has it; params.yaml has alpaca."""
    folder = Path(shutil.copytree(evaluated, tmp_path / "copy", symlinks=True))
    file = folder / "artifacts/prepared/test.jsonl"
    row = next(row for row in read_examples(file) if row["messages"][0]["context"])
    write_jsonl(file, [row])
    api.prompt_token_ids = prompt_token_ids(row)
    done = script("tools/smoke.py", "--port", str(api.port), cwd=folder)  # type: ignore[attr-defined]
    assert done.returncode == 0, done.stderr
    asked = row["messages"][0]
    for body in api.bodies:
        content = f"{asked['content']}\n\n### Context:\n{asked['context']}"
        assert body["messages"] == [{"role": "user", "content": content}]
        assert body.keys() == {"model", "messages", "max_tokens", "return_token_ids"}


def test_a_server_that_makes_another_prompt_of_the_first_test_row_fails(api: type[Api], evaluated: Path) -> None:
    api.prompt_token_ids = [1, 2, 3]
    done = script("tools/smoke.py", "--port", str(api.port), cwd=evaluated)  # type: ignore[attr-defined]
    assert_one_line(done, "another prompt of the first test row than eval_vllm gave", "restart the server")
    assert "I am tuned." in done.stdout
