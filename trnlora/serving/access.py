"""What the server answers: the routes that it serves, with the key, from the model that is named. All else is refused.

vLLM asks for VLLM_API_KEY below a few paths only and answers the others without it: "Do not rely exclusively on
--api-key for securing access to vLLM", but put an allow-list of routes before it (vLLM, docs/usage/security.md).
`Access` is that list, in vLLM's process: vllm_args.py passes it with --middleware, and vLLM makes it the outermost
layer of its application. A route that another version of vLLM adds is refused until it is written here.

vLLM's process may be of another Python environment, so this imports the standard library only, on Python 3.10 or later.
"""

import hashlib
import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

# As asgiref and starlette name them.
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

# Trainium: vLLM's name for the model without any adapter. A request that reaches it ends the engine (neuron_lora.py).
NO_ADAPTER = "no-adapter"
# Names that no adapter can have. One called like a kind of message content, up to its first "_" (`text` for a part of
# {"type": "text"}), would answer the chat requests for `base` that have such content (vllm/entrypoints/serve/engine/
# serving.py, _get_active_default_mm_loras; the kinds: vllm/renderers/chat_utils.py, MM_PARSER_MAP).
RESERVED = frozenset(
    {NO_ADAPTER, "text", "thinking", "input", "output", "image", "audio", "video", "prompt", "refusal", "tool"}
)

# Method and path of each route. Paths are compared as they are: a trailing slash or another case is another path.
OPEN = frozenset({("GET", "/health")})  # answered without the key
# Answers of a model. vLLM answers a request without "model" from the base model; here it must name one.
ANSWERS = frozenset(
    {
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/responses"),
        ("POST", "/v1/messages"),
    }
)
# Served only where serve.runtime_adapters allows it: vllm_args.server_environment.
LOAD = ("POST", "/v1/load_lora_adapter")
UNLOAD = ("POST", "/v1/unload_lora_adapter")
SERVED = (
    OPEN
    | ANSWERS
    | {
        ("GET", "/v1/models"),
        ("POST", "/v1/messages/count_tokens"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("GET", "/metrics"),
        ("GET", "/load"),
        ("GET", "/version"),
        LOAD,
        UNLOAD,
    }
)

_NO_KEY = "the API key is missing or wrong: send it in the header Authorization: Bearer KEY"


class Access:
    """ASGI middleware: refuses what is not of OPEN without the key (401), what is not of SERVED (404), and requests for
    ANSWERS that name no model (400). Without VLLM_API_KEY in the environment, no key is asked for.
    """

    def __init__(self, app: Application) -> None:
        self._app = app
        key = os.environ.get("VLLM_API_KEY", "")
        self._key = _digest(key.encode("utf-8", "surrogateescape")) if key else None
        runtime_adapters = os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") == "1"
        self._served = SERVED if runtime_adapters else SERVED - {LOAD, UNLOAD}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        route = (scope.get("method", "WEBSOCKET"), scope["path"])
        if route not in OPEN and not self._has_key(scope):
            await _refuse(scope, send, 401, "AuthenticationError", _NO_KEY)
        elif route not in self._served:
            fix = ": set serve.runtime_adapters: true and restart the server" if route in SERVED else ""
            await _refuse(scope, send, 404, "NotFoundError", f"{' '.join(route)} is not served{fix}")
        elif route not in ANSWERS and route != LOAD:
            await self._app(scope, receive, send)
        elif (body := await _read(receive)) is not None:
            if problem := _load_problem(body) if route == LOAD else _answer_problem(body):
                await _refuse(scope, send, *problem)
            else:
                await self._app(scope, _replay(body, receive), send)

    def _has_key(self, scope: Scope) -> bool:
        if self._key is None:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(_digest(key), self._key)


def _digest(key: bytes) -> bytes:
    """Of equal length for all keys, so that the time of a comparison says nothing about the length either."""
    return hashlib.sha256(key).digest()


def _answer_problem(body: bytes) -> tuple[int, str, str] | None:
    """Status, kind and message of the error for a request of ANSWERS; None if vLLM may have it, to answer or refuse."""
    request = _parse(body)
    if request is None:
        return None
    model = request.get("model")
    if not model:
        return 400, "BadRequestError", 'name a model: "model" is missing or empty'
    if model == NO_ADAPTER:
        return 404, "NotFoundError", f"The model `{model}` does not exist."
    return None


def _load_problem(body: bytes) -> tuple[int, str, str] | None:
    """The same of a request for LOAD."""
    name = (_parse(body) or {}).get("lora_name")
    if isinstance(name, str) and name in RESERVED:
        return 400, "BadRequestError", f"`{name}` has a meaning of its own in vLLM: choose another name"
    return None


def _parse(body: bytes) -> dict[str, Any] | None:
    """The JSON object of a request, as vLLM reads it; None for what is none, which vLLM refuses."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return request if isinstance(request, dict) else None


async def _read(receive: Receive) -> bytes | None:
    """The body of a request; None if the client has gone before its end."""
    parts = []
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body again, then what `receive` gives: that the client has gone."""
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return unread.pop() if unread else await receive()

    return replay


async def _refuse(scope: Scope, send: Send, status: int, kind: str, message: str) -> None:
    """Answer with an error in vLLM's form, to a websocket before it is accepted."""
    websocket = scope["type"] == "websocket"
    if websocket and "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008, "reason": message})
        return
    start = "websocket.http.response" if websocket else "http.response"
    error = {"message": message, "type": kind, "param": None, "code": status}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": f"{start}.start", "status": status, "headers": headers})
    await send({"type": f"{start}.body", "body": b"" if scope.get("method") == "HEAD" else body})
