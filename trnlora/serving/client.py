"""Requests of the tools to the running server. What can go wrong becomes one line for the user."""

import json
import os
import urllib.error
import urllib.request
from typing import Any

from trnlora.errors import UserError


class Unreachable(UserError):
    """No server answers."""


def headers() -> dict[str, str]:
    """With the API key of the environment, VLLM_API_KEY, where there is one."""
    key = os.environ.get("VLLM_API_KEY")
    return {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}


def request(url: str, path: str, body: dict[str, Any] | None = None, timeout: float = 300) -> Any:
    """GET, or POST `body` as JSON; the parsed reply or its text. Raises Unreachable, or UserError for a refusal."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, data, headers()), timeout=timeout) as response:
            text = response.read().decode()
            return json.loads(text) if "json" in response.headers.get("Content-Type", "") else text
    except urllib.error.HTTPError as error:
        raise UserError(refusal(url, error.code, error.read().decode(errors="replace"))) from None
    except OSError as error:
        raise Unreachable(unreachable(url, getattr(error, "reason", error))) from None


def refusal(url: str, status: int, text: str) -> str:
    """What an error reply of the server says, as a sentence."""
    if status == 401:
        return f"the server at {url} wants an API key: set VLLM_API_KEY as for `make serve`"
    try:
        reply = json.loads(text)
        said = reply.get("message") or reply["error"]["message"]
    except (ValueError, KeyError, TypeError, AttributeError):
        said = text
    return f"the server at {url} refused the request ({status}): {' '.join(str(said).split())[:300]}"


def unreachable(url: str, reason: object) -> str:
    return f"no server answers at {url} ({reason}): start one with `make serve`"
