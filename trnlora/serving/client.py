"""Requests to the running server. Every failure becomes one line for the user."""

import functools
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from trnlora.errors import UserError
from trnlora.serving.access import NO_ADAPTER

_CONNECT_SECONDS = 10.0


class Unreachable(UserError):
    """No server answers."""


def api_key() -> str | None:
    """The server's key, VLLM_API_KEY of the environment; None if that is not set or empty.

    Raises UserError for one that no HTTP header can carry.
    """
    key = os.environ.get("VLLM_API_KEY")
    if key and not re.fullmatch(r"[!-~]([ -~]*[!-~])?", key):
        raise UserError(
            "VLLM_API_KEY holds something that is not a key: give it printable ASCII characters, without blanks at "
            "either end (`openssl rand -hex 32` prints some), or unset it"
        )
    return key or None


def base_url(host: str, port: int) -> str:
    """The URL at which a client on this machine reaches a server bound to `host`:`port`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def headers() -> dict[str, str]:
    """HTTP headers of a request: JSON, and the API key if there is one. Raises as `api_key` does."""
    key = api_key()
    return {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}


@functools.cache
def _web() -> httpx.Client:
    """Made once, since it reads the system's certificates. No connection is kept: the server may be restarted."""
    return httpx.Client(trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))


def request(url: str, path: str, body: dict[str, Any] | None = None, timeout: float = 300) -> Any:
    """Send GET, or POST with `body` as JSON; return the parsed reply, or its text if it is not JSON.

    No proxy and no redirection is followed: they would get the key. timeout: seconds. Raises Unreachable if no server
    answers, and UserError if it refuses the request, is another kind of server, or for the key.
    """
    method, content = ("GET", None) if body is None else ("POST", json.dumps(body))
    limit = httpx.Timeout(timeout, connect=_CONNECT_SECONDS)
    try:
        reply = _web().request(method, url + path, content=content, headers=headers(), timeout=limit)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise no_answer(url, error) from None
    if not reply.is_success:
        raise UserError(refusal(url, reply.status_code, reply.text))
    if "json" not in reply.headers.get("Content-Type", ""):
        return reply.text
    try:
        return reply.json()
    except (ValueError, RecursionError):
        raise UserError(not_vllm(url)) from None


def served_models(url: str, timeout: float = 300) -> list[str]:
    """The names of the models that clients may ask for. Raises as `request` does, and if the server is not vLLM."""
    reply = request(url, "/v1/models", timeout=timeout)
    try:
        names = [model["id"] for model in reply["data"]]
    except (KeyError, TypeError):
        raise UserError(not_vllm(url)) from None
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(not_vllm(url))
    return [name for name in names if name != NO_ADAPTER]


def check_model(name: str, names: list[str]) -> str:
    """Return `name`. Raises UserError if it is not one of the server's models, `names`."""
    if name not in names:
        raise UserError(f"the server has no model {name!r}: it has {', '.join(names)}")
    return name


def served_folders(url: str) -> dict[str, Path]:
    """Where the server has its adapters, by name: paths of its machine. Raises as `served_models` does."""
    reply = request(url, "/v1/models")
    try:
        return {model["id"]: Path(model["root"]) for model in reply["data"] if model.get("parent")}
    except (KeyError, TypeError, AttributeError):
        raise UserError(not_vllm(url)) from None


def max_model_len(url: str) -> int:
    """Tokens of a prompt and its answer at the most. Raises as `served_models` does."""
    try:
        return next(int(model["max_model_len"]) for model in request(url, "/v1/models")["data"] if not model["parent"])
    except (KeyError, TypeError, ValueError, StopIteration):
        raise UserError(not_vllm(url)) from None


def started_at(url: str) -> float | None:
    """When the server's process started, in seconds since 1970; None for several processes, which do not tell.

    Raises as `request` does.
    """
    found = re.search(r"^process_start_time_seconds (\S+)$", str(request(url, "/metrics")), re.MULTILINE)
    return float(found[1]) if found else None


class ChatReply(NamedTuple):
    """The answer to a conversation, and the prompt that the server made of it, in token ids (None: it does not say)."""

    text: str
    prompt_token_ids: list[int] | None


def chat(url: str, model: str, messages: list[dict[str, str]], max_tokens: int) -> ChatReply:
    """The answer of `model` to a conversation, with the server's sampling defaults, which are those of the evaluation.

    Raises as `request` does, and if the server is not vLLM.
    """
    body = {"model": model, "messages": messages, "max_tokens": max_tokens, "return_token_ids": True}
    reply = request(url, "/v1/chat/completions", body)
    try:
        text, ids = reply["choices"][0]["message"]["content"] or "", reply.get("prompt_token_ids")
    except (KeyError, IndexError, TypeError, AttributeError):
        text = ids = None
    if not isinstance(text, str):
        raise UserError(not_vllm(url))
    return ChatReply(text, ids)


def refusal(url: str, status: int, text: str) -> str:
    """The server's error reply as one sentence."""
    if status == 401:
        if api_key():
            return f"the server at {url} has another API key than VLLM_API_KEY: set it to the key it was started with"
        return f"the server at {url} requires an API key: set VLLM_API_KEY to the key it was started with"
    try:
        reply = json.loads(text)
        message = reply.get("message") or reply.get("detail") or reply["error"]["message"]  # FastAPI's form is detail
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        shown = " ".join(text.split())[:100] or "nothing"
        return f"the server at {url} does not answer as vLLM does ({status}: {shown}): give another --port"
    return f"the server at {url} refused the request ({status}): {' '.join(str(message).split())[:300]}"


def no_answer(url: str, error: httpx.HTTPError | httpx.InvalidURL) -> UserError:
    """The error for a request that got no answer: Unreachable, unless a server is there."""
    if isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol):
        return UserError(f"{url!r} is not the address of a server ({error}): give one such as http://127.0.0.1:8000")
    if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
        return UserError(f"the server at {url} accepted the request and did not answer in time: is it overloaded?")
    # h11 says so of a server that ends in the middle of a request; of any other reply, that it is not HTTP.
    gone = "disconnected" in str(error) or "closed connection" in str(error)
    if isinstance(error, httpx.RemoteProtocolError | httpx.DecodingError) and not gone:
        return UserError(not_vllm(url))
    reason = str(error) or type(error).__name__
    return Unreachable(f"no server answers at {url} ({reason}): start one with `make serve`")


def not_vllm(url: str) -> str:
    """The sentence for a server that answers, but not as vLLM does."""
    return f"the server at {url} is not vLLM: give another --port"
