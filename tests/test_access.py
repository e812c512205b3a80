"""What the server answers: a short list of routes, with the key, from the model that is named; and its clients' errors.

The real server with a key is in test_whole_run.py: test_the_key_opens_….
"""

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import threading
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import ROOT
from support.evaluation import EvalWorker
from support.routes import KEY, PREFLIGHT, RIGHT, WRONG, Headers, status
from support.server import Server, assert_one_line, free_port, script

from trnlora.errors import UserError
from trnlora.params import load_params
from trnlora.serving import client
from trnlora.serving.access import ANSWERS, RESERVED, SERVED, Access
from trnlora.serving.adapters import Adapter, parse_adapters
from trnlora.serving.vllm_args import serve_command, server_environment

# The routes


@pytest.mark.slow
def test_every_route_of_vllm_needs_the_key_and_few_are_served(eval_worker: EvalWorker) -> None:
    """The application as the installed vLLM builds it from the flags of `make serve`."""
    adapter = Adapter("tuned", Path("artifacts/adapter"), 16, frozenset({"q_proj"}))
    command = serve_command(load_params(ROOT / "params.yaml"), "127.0.0.1", 8000, Path("chat.jinja"), [adapter])
    found = eval_worker.ask_every_route(command[command.index("--model") :])
    registered = {(method, path) for method, path in found["registered"]}
    assert {("POST", "/invocations"), ("WEBSOCKET", "/v1/realtime"), ("POST", "/pause"), ("GET", "/docs")} < registered
    assert len(registered) >= 70
    assert len(found["without_key"]) > 10 * 2 * len(registered)
    assert {(method, path) for method, path, code in found["without_key"] if code != 401} == {("GET", "/health")}
    assert {(method, path) for method, path, code in found["with_key"] if code != 404} == {
        ("GET", "/health"), ("GET", "/metrics"), ("GET", "/load"), ("GET", "/version"), ("GET", "/v1/models"),
        ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("POST", "/v1/responses"),
        ("POST", "/v1/messages"), ("POST", "/v1/messages/count_tokens"), ("POST", "/tokenize"), ("POST", "/detokenize"),
        ("POST", "/v1/load_lora_adapter"), ("POST", "/v1/unload_lora_adapter"),
    }  # fmt: skip
    assert registered >= SERVED
    assert {kind.split("_")[0] for kind in found["content"]} <= RESERVED


async def answering(scope: Any, receive: Any, send: Any) -> None:
    """An application that answers everything."""
    await send({"type": "http.response.start", "status": 200, "headers": []})


NOT_THE_KEY = [
    *(b"", b"Bearer", b"Bearer ", b"Bearer  the-key", b"Basic the-key", b"the-key", b"Bearer the-ke", b"Bearer \xff"),
    *(b"Bearer the-keyy", b"Bearer THE-KEY", b"Bearer the-key, Bearer the-key"),
]


@pytest.mark.parametrize(
    ("method", "path", "headers", "expected"),
    [
        ("GET", "/health", [], 200),
        ("GET", "/health", WRONG, 200),
        ("HEAD", "/health", [], 401),
        ("WEBSOCKET", "/health", [], 401),
        ("GET", "/health/", [], 401),
        ("GET", "/metrics", [], 401),
        ("OPTIONS", "/v1/models", [*WRONG, *PREFLIGHT], 401),
        ("GET", "/a-new-route", [], 401),
        ("GET", "/a-new-route", RIGHT, 404),
        ("WEBSOCKET", "/v1/realtime", RIGHT, 404),
        ("GET", "/v1/models", [], 401),
        ("GET", "/v1/models", WRONG, 401),
        ("GET", "/v1/models", RIGHT, 200),
        ("POST", "/v1/models", RIGHT, 404),
        ("GET", "/v1/models", [(b"authorization", f"bearer {KEY}".encode())], 200),
        *(("GET", "/v1/models", [(b"authorization", value)], 401) for value in NOT_THE_KEY),
        ("GET", "/v1/models", [(b"x-api-key", KEY.encode())], 401),
        ("GET", "/v1/models", [*WRONG, *RIGHT], 401),
    ],
)  # fmt: skip
def test_the_key_opens_what_is_served(
    method: str, path: str, headers: Headers, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    assert asyncio.run(status(Access(answering), method, path, headers)) == expected


@pytest.mark.parametrize("key", [None, ""])
def test_without_a_key_the_same_routes_are_served(key: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("VLLM_API_KEY", key)
    assert asyncio.run(status(Access(answering), "GET", "/v1/models", [])) == 200
    assert asyncio.run(status(Access(answering), "POST", "/invocations", [])) == 404


@pytest.mark.parametrize(("allowed", "expected"), [("1", 200), ("0", 404), (None, 404), ("true", 404)])
def test_adapters_are_loaded_only_where_params_allow_it(
    allowed: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.delenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", raising=False)
    if allowed is not None:
        monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", allowed)
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        assert asyncio.run(status(Access(answering), "POST", path, [])) == expected


def test_the_users_own_variables_do_not_change_what_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_SKIP_MODEL_NAME_VALIDATION", "VLLM_USE_RUST_FRONTEND", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        monkeypatch.setenv(name, "1")
        assert server_environment(runtime_adapters=False)[name] == "0"


# The model that answers


class Body:
    """A request whose body arrives in parts, after which the client is gone."""

    def __init__(self, *parts: bytes) -> None:
        self.parts = list(parts)

    async def receive(self) -> dict[str, Any]:
        if not self.parts:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": self.parts.pop(0), "more_body": bool(self.parts)}


def test_the_application_gets_the_body_as_it_was_sent_and_notices_that_the_client_has_gone() -> None:
    got: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        got.extend([await receive(), await receive()])

    request = Body(b'{"model": "tuned", ', b'"prompt": "x"}')
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    asyncio.run(Access(application)(scope, request.receive, None))  # type: ignore[arg-type]
    assert got == [
        {"type": "http.request", "body": b'{"model": "tuned", "prompt": "x"}', "more_body": False},
        {"type": "http.disconnect"},
    ]
    got.clear()
    request = Body()  # the client is gone before it has sent anything
    asyncio.run(Access(application)(scope, request.receive, None))  # type: ignore[arg-type]
    assert got == []


@pytest.mark.parametrize(
    ("body", "expected"),
    [(b'{"model": "x"}', 200), (b"{}", 400), (b'{"model": ""}', 400), (b'{"model": "a", "model": null}', 400),
     (b'{"model": "no-adapter"}', 404), (b"not JSON", 200), (b"[]", 200), (b"[" * 100_000, 200)],
)  # fmt: skip
def test_a_request_for_an_answer_names_a_model(body: bytes, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """200: vLLM gets it. It refuses unknown names, and bodies that are not JSON objects, by itself."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    for method, path in ANSWERS:
        assert asyncio.run(status(Access(answering), method, path, [], body)) == expected


ASKED: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
    "/v1/responses": {"input": "x", "max_output_tokens": 2},
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(ASKED))
def test_an_answer_is_of_the_named_model(server: Server, path: str) -> None:
    """No name, no answer; another name, no answer. `no-adapter` is what vLLM calls the bare model on Trainium."""
    assert {path for _, path in ANSWERS} == ASKED.keys()
    for model in ("base", "first"):
        assert server.request(path, **ASKED[path], model=model)["model"] == model
    refused = {"unknown": 404, "Tuned": 404, "tuned ": 404, "no-adapter": 404, "": 400, None: 400, (): 400, 1: 400}
    for name, code in refused.items():
        with pytest.raises(urllib.error.HTTPError) as error:
            server.request(path, **ASKED[path], model=name)
        assert error.value.code == code, name
    with pytest.raises(urllib.error.HTTPError) as error:
        server.request(path, **ASKED[path])
    assert error.value.code == 400
    assert "model" in error.value.read().decode()


@pytest.mark.slow
def test_routes_that_answer_for_any_name_are_not_served(server: Server) -> None:
    for model in ("unknown", "tuned"):
        with pytest.raises(urllib.error.HTTPError) as error:
            server.request("/invocations", **ASKED["/v1/completions"], model=model)
        assert error.value.code == 404
        assert json.load(error.value)["error"]["message"] == "POST /invocations is not served"


@pytest.mark.slow
def test_an_adapter_cannot_take_the_base_models_requests(server: Server, others: list[Path]) -> None:
    """vLLM answers a request for `base` whose message has a part of type "text" from an adapter called `text`."""
    with pytest.raises(urllib.error.HTTPError) as error:
        server.request("/v1/load_lora_adapter", lora_name="text", lora_path=str(others[0]))
    assert json.load(error.value)["error"]["message"].startswith("`text` has a meaning of its own in vLLM")
    messages = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
    assert server.request("/v1/chat/completions", model="base", messages=messages, max_tokens=2)["model"] == "base"
    with pytest.raises(UserError, match="'text' has a meaning of its own in vLLM"):
        parse_adapters(["text=folder"])


# The key and the clients


@pytest.mark.parametrize(
    "key", [" ", "\t \n", " abc", "abc ", "abc\n", "abc\r\nHost: b", "abc\x7fd", "schlüssel", "abc\udcff", "\0abc"]
)
def test_what_no_header_can_carry_is_not_a_key(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {"VLLM_API_KEY": key})  # not setenv: \0 cannot be in a real environment
    with pytest.raises(UserError, match="VLLM_API_KEY holds something that is not a key") as error:
        client.request("http://127.0.0.1:9", "/v1/models")
    assert not key.strip() or key not in str(error.value)


@pytest.mark.parametrize("key", ["x", "two words", "0123abcDEF", "-._~+/=!\"'\\"])
def test_what_a_header_can_carry_is_a_key(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", key)
    headers = [(name.lower().encode(), value.encode()) for name, value in client.headers().items()]
    assert asyncio.run(status(Access(answering), "GET", "/v1/models", headers)) == 200


@pytest.mark.parametrize("tool", ["tools/serve.py", "tools/ui.py", "tools/smoke.py --question ?"])
def test_a_key_of_blanks_is_refused(tool: str, workdir: Path) -> None:
    assert_one_line(
        script(*tool.split(), cwd=workdir, VLLM_API_KEY="  "), "VLLM_API_KEY holds something that is not a key"
    )


@contextlib.contextmanager
def replying(reply: bytes | None) -> Iterator[str]:
    """The URL of a server that sends `reply` to whatever it gets and hangs up; with None it says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            kept = []
            with contextlib.suppress(OSError):  # the listener is closed
                while True:
                    connection, _ = listener.accept()
                    if reply is None:
                        kept.append(connection)
                        continue
                    connection.recv(65536)
                    connection.sendall(reply)
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(65536)
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def reply(body: str, kind: str = "application/json", status: str = "200 OK", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", body]).encode()


NOT_VLLM = "is not vLLM: give another --port"
NOT_AS_VLLM = "does not answer as vLLM does"
REPLIES: dict[str, tuple[bytes | None, str]] = {
    "hangs up": (b"", "no server answers at"),
    "ends in the middle": (reply("{", **{"Content-Length": "9"}), "no server answers at"),
    "says nothing": (None, "accepted the request and did not answer in time"),
    "binary": (bytes(range(256)), NOT_VLLM),
    "a web page": (reply("<html>", "text/html"), NOT_VLLM),
    "no JSON": (reply("{"), NOT_VLLM),
    "not UTF-8": (reply("{").replace(b"{", b'{"data": "\xff"}'), NOT_VLLM),
    "nested JSON": (reply("[" * 100_000), NOT_VLLM),
    "another encoding": (reply("{}", **{"Content-Encoding": "gzip"}), NOT_VLLM),
    "a list": (reply("[]"), NOT_VLLM),
    "null": (reply("null"), NOT_VLLM),
    "no models": (reply('{"data": []}'), NOT_VLLM),
    "other models": (reply('{"data": ["base"]}'), NOT_VLLM),
    "numbered models": (reply('{"data": [{"id": 1}]}'), NOT_VLLM),
    "no such page": (reply("<html>No</html>", "text/html", "404 Not Found"), f"{NOT_AS_VLLM} (404: <html>No</html>)"),
    "a redirection": (reply("", status="307 Moved", Location="http://127.0.0.1:9/"), f"{NOT_AS_VLLM} (307: nothing)"),
    "a proxy without a server": (reply("Bad", "text/html", "502 Bad"), f"{NOT_AS_VLLM} (502: Bad)"),
    "an error of FastAPI": (reply('{"detail": "Not Found"}', status="404 No"), "refused the request (404): Not Found"),
    "an error": (reply('{"error": {"message": "a\\nb"}}', status="500 No"), "refused the request (500): a b"),
    "a key": (reply("{}", status="401 No"), "requires an API key: set VLLM_API_KEY to the key it was started with"),
}


@pytest.mark.parametrize("kind", REPLIES)
def test_a_reply_that_is_not_vllms_is_one_clear_line(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    sent, expected = REPLIES[kind]
    with replying(sent) as url, pytest.raises(UserError) as error:
        client.served_models(url, timeout=0.5 if sent is None else 30)
    assert expected in str(error.value)
    assert url in str(error.value)


def test_a_wrong_key_is_told_from_a_missing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "a-wrong-one")
    with replying(reply("{}", status="401 No")) as url, pytest.raises(UserError) as error:
        client.served_models(url)
    assert "has another API key than VLLM_API_KEY" in str(error.value)
    assert "a-wrong-one" not in str(error.value)


def test_requests_go_to_the_server_and_not_to_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with replying(reply('{"data": [{"id": "base"}]}')) as url:
        assert client.served_models(url) == ["base"]


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://x", "http://", "http://[", "http://x:99999999", "http://a b"]
)
def test_what_is_no_address_is_one_line(url: str) -> None:
    with pytest.raises(UserError):
        client.served_models(url, timeout=5)


def test_the_page_does_not_start_on_a_port_in_use(workdir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = script("tools/ui.py", "--port", str(free_port()), "--ui-port", port, cwd=workdir)
    assert_one_line(done, port, "in use", "--ui-port 7861")


def test_the_middleware_runs_in_an_environment_without_this_project(tmp_path: Path) -> None:
    """As on Trainium: another Python, which has none of our packages. -S leaves out site-packages."""
    code = f"import {Access.__module__}, sys; print(sorted(m for m in sys.modules if m.startswith('trnlora')))"
    env = {"PYTHONPATH": server_environment(runtime_adapters=False)["PYTHONPATH"]}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout == "['trnlora', 'trnlora.serving', 'trnlora.serving.access']\n"
