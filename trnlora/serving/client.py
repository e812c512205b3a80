"""Requests to the running server. Every failure becomes one line for the user."""

import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

from trnlora.errors import UserError
from trnlora.serving.adapters import NO_ADAPTER


class Unreachable(UserError):
    """No server answers."""


def base_url(host: str, port: int) -> str:
    """The URL at which a client on this machine reaches a server bound to `host`:`port`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def headers() -> dict[str, str]:
    """HTTP headers of a request: JSON, and the API key from VLLM_API_KEY if it is set."""
    key = os.environ.get("VLLM_API_KEY")
    return {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}


def request(url: str, path: str, body: dict[str, Any] | None = None, timeout: float = 300) -> Any:
    """Send GET, or POST with `body` as JSON; return the parsed reply, or its text if it is not JSON.

    timeout: seconds. Raises Unreachable if no server answers, and UserError if it refuses the request.
    """
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, data, headers()), timeout=timeout) as response:
            text = response.read().decode()
            return json.loads(text) if "json" in response.headers.get("Content-Type", "") else text
    except urllib.error.HTTPError as error:
        raise UserError(refusal(url, error.code, error.read().decode(errors="replace"))) from None
    except OSError as error:
        raise Unreachable(unreachable(url, getattr(error, "reason", error))) from None


def served_models(url: str, timeout: float = 300) -> list[str]:
    """The names of the models that clients may ask for. Raises as `request` does, and if the server is not vLLM."""
    reply = request(url, "/v1/models", timeout=timeout)
    try:
        return [model["id"] for model in reply["data"] if model["id"] != NO_ADAPTER]
    except (KeyError, TypeError):
        raise UserError(not_vllm(url)) from None


def served_folders(url: str) -> dict[str, Path]:
    """Where the server has its adapters, by name: paths of its machine. Raises as `served_models` does."""
    reply = request(url, "/v1/models")
    try:
        return {model["id"]: Path(model["root"]) for model in reply["data"] if model.get("parent")}
    except (KeyError, TypeError, AttributeError):
        raise UserError(not_vllm(url)) from None


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
        return ChatReply(reply["choices"][0]["message"]["content"] or "", reply.get("prompt_token_ids"))
    except (KeyError, IndexError, TypeError, AttributeError):
        raise UserError(not_vllm(url)) from None


def refusal(url: str, status: int, text: str) -> str:
    """The server's error reply as one sentence."""
    if status == 401:
        return f"the server at {url} requires an API key: set VLLM_API_KEY to the key it was started with"
    try:
        reply = json.loads(text)
        message = reply.get("message") or reply["error"]["message"]
    except (ValueError, KeyError, TypeError, AttributeError):
        message = text
    return f"the server at {url} refused the request ({status}): {' '.join(str(message).split())[:300]}"


def unreachable(url: str, reason: object) -> str:
    """The sentence for a server that does not answer."""
    return f"no server answers at {url} ({reason}): start one with `make serve`"


def not_vllm(url: str) -> str:
    """The sentence for a server that answers, but not as vLLM does."""
    return f"the server at {url} is not vLLM: give another --port"
