"""Every route of the application that the installed vLLM builds, asked in this process, without an engine."""

import asyncio
import itertools
import os
from collections.abc import Iterator
from typing import Any

KEY = "the-key"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT")
Headers = list[tuple[bytes, bytes]]
PREFLIGHT: Headers = [(b"origin", b"http://elsewhere"), (b"access-control-request-method", b"POST")]
WRONG: Headers = [(b"authorization", b"Bearer wrong")]
RIGHT: Headers = [(b"authorization", f"Bearer {KEY}".encode())]


def ask_every_route(flags: list[str]) -> dict[str, Any]:
    """What the server answers that `flags` describe, those of serve_command, started with VLLM_API_KEY: KEY.

    registered: [method, path] of each route that vLLM has for any kind of model, development mode included; the method
    of a websocket is WEBSOCKET. without_key, with_key: [method, path, status] of each answer; without one, every
    route is asked by every method, at its path and at others that look like it, also with a wrong key.
    content: the kinds of message content.
    """
    from vllm import envs
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.renderers.chat_utils import MM_PARSER_MAP
    from vllm.tasks import FRONTEND_TASKS, GENERATION_TASKS, POOLING_TASKS
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    envs.disable_envs_cache()
    os.environ |= {"VLLM_API_KEY": KEY, "VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
    app = build_app(args, (*GENERATION_TASKS, *POOLING_TASKS, *FRONTEND_TASKS))
    registered = sorted(set(walk(app.routes)))
    paths = sorted({like for _, path in registered for like in look_alikes(path)})
    asked = itertools.product((*METHODS, "WEBSOCKET"), paths)
    without_key = [(*route, headers) for route in asked for headers in ([], [*WRONG, *PREFLIGHT])]
    return {
        "registered": registered,
        "without_key": asyncio.run(statuses(app, without_key)),
        "with_key": asyncio.run(statuses(app, [(*route, RIGHT) for route in registered])),
        "content": sorted(MM_PARSER_MAP),
    }


def walk(routes: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Method and path of each route below `prefix`. A mounted application has every method."""
    for route in routes:
        if not hasattr(route, "path"):
            raise TypeError(f"what is the path of a {type(route)}?")
        path = prefix + route.path.replace("{", "").replace("}", "")
        yield from walk(getattr(route, "routes", None) or [], path)
        kind = type(route).__name__
        methods = getattr(route, "methods", None) or (["WEBSOCKET"] if "WebSocket" in kind else METHODS)
        yield from ((method, path) for method in methods)


def look_alikes(path: str) -> set[str]:
    return {path, f"{path}/", f"/{path}", path.upper(), f"{path}/../health", f"/health/..{path}", f"/health{path}"}


async def statuses(app: Any, requests: list[tuple[str, str, Headers]]) -> list[tuple[str, str, int]]:
    return [(method, path, await status(app, method, path, headers)) for method, path, headers in requests]


async def status(app: Any, method: str, path: str, headers: Headers, body: bytes = b"") -> int:
    """The status of the answer to one request; 500 if the application fails."""
    sent: list[dict[str, Any]] = []
    kind = "websocket" if method == "WEBSOCKET" else "http"

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"} if kind == "websocket" else {"type": "http.request", "body": body}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": kind, "method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "headers": headers, "scheme": "http", "http_version": "1.1", "asgi": {"version": "3.0"},
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "extensions": {"websocket.http.response": {}},
    }  # fmt: skip
    if kind == "websocket":
        del scope["method"]
    try:
        await app(scope, receive, send)
    except Exception:
        if not sent:
            return 500
    return int(sent[0].get("status", 101))
