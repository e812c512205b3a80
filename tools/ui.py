"""Base and adapters side by side in the browser: one prompt, every answer streaming, until Ctrl-C.

    python tools/ui.py [--params FILE] [--host HOST] [--port PORT] [--ui-port PORT] [--adapters …]     (make ui)

HOST and PORT are those of the running server; where none answers, tools/serve.py is started with --adapters. The page
is on 127.0.0.1 alone, since it passes on the API key (VLLM_API_KEY): from elsewhere, `ssh -L 7860:127.0.0.1:7860`.
Prompts are rendered by trnlora/data/templates.py and sent as token ids, as training and evaluation have them.
"""

import argparse
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from trnlora import paths
from trnlora.data import templates
from trnlora.errors import UserError, run
from trnlora.params import Params, load_params
from trnlora.serving import client
from trnlora.serving import vllm_args as serving

PAGE = Path(__file__).with_name("ui.html")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=paths.PARAMS, help="params file (default: %(default)s)")
    parser.add_argument("--host", help="address of vLLM's server (default: serve.host)")
    parser.add_argument("--port", type=int, help="port of vLLM's server (default: serve.port)")
    parser.add_argument("--ui-port", type=int, default=7860, help="port of the page (default: %(default)s)")
    parser.add_argument("--adapters", nargs="+", metavar="NAME=FOLDER", help="as for tools/serve.py, if it is started")
    args = parser.parse_args()
    params = load_params(args.params)
    host, port = args.host or params.serve.host, args.port or params.serve.port
    url = serving.base_url(host, port)

    import uvicorn

    command = [sys.executable, str(Path(__file__).with_name("serve.py")), "--params", str(args.params)]
    command += ["--host", host, "--port", str(port), *(["--adapters", *args.adapters] if args.adapters else [])]
    with running_server(url, command):
        app = application(params, url)
        print(f"open http://127.0.0.1:{args.ui_port} · Ctrl-C stops it", flush=True)
        uvicorn.run(app, host="127.0.0.1", port=args.ui_port, log_level="warning")


@contextlib.contextmanager
def running_server(url: str, command: list[str]) -> Iterator[None]:
    """The server at `url`; where none answers, started with `command` and stopped at the end."""
    if answers(url):
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the server is not left behind
    server = subprocess.Popen(command, start_new_session=True)  # Ctrl-C reaches us, and we stop it
    try:
        while not answers(url):
            if server.poll() is not None:
                raise UserError("the server did not start: its reason is above")
            time.sleep(0.5)
        yield
    finally:
        server.terminate()
        server.wait()


def answers(url: str) -> bool:
    try:
        client.request(url, "/v1/models", timeout=5)
    except client.Unreachable:
        return False
    except UserError:
        pass  # one that refuses is there, and the page shows why
    return True


def application(params: Params, url: str) -> Any:
    """The page and the three requests that it makes."""
    import httpx
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(paths.MODEL)
    template = params.data.prompt_template

    async def page(_: Request) -> Response:
        return FileResponse(PAGE)

    async def models(_: Request) -> Response:
        try:
            served = (await run_in_threadpool(client.request, url, "/v1/models", None, 5))["data"]
        except UserError as error:
            return JSONResponse({"error": f"{error}"}, 502)
        names = [model["id"] for model in served]
        return JSONResponse({"models": names, "template": template, "max_tokens": params.eval.max_tokens})

    async def render(request: Request) -> Response:
        asked = await request.json()
        return JSONResponse({"prompt": rendered(asked)})

    def rendered(asked: dict[str, Any]) -> str:
        return templates.render_prompt(tokenizer, template, asked["instruction"].strip(), asked["context"].strip())

    async def complete(request: Request) -> Response:
        """vLLM's stream as it comes; an error before or within it as one line that a person can read."""
        asked = await request.json()
        body = {key: asked[key] for key in ("model", "temperature", "top_p", "max_tokens")} | {
            "prompt": tokenizer(rendered(asked), add_special_tokens=False)["input_ids"],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        web = httpx.AsyncClient(timeout=300, trust_env=False)
        try:
            reply = await web.send(
                web.build_request("POST", f"{url}/v1/completions", json=body, headers=client.headers()), stream=True
            )
        except httpx.HTTPError as error:
            await web.aclose()
            return JSONResponse({"error": client.unreachable(url, error)}, 502)
        if reply.status_code != 200:
            text = (await reply.aread()).decode(errors="replace")
            await web.aclose()
            return JSONResponse({"error": client.refusal(url, reply.status_code, text)}, 502)

        async def stream() -> AsyncIterator[bytes]:
            try:
                async for chunk in reply.aiter_raw():
                    yield chunk
            except httpx.HTTPError:  # the page says that the answer is not whole: its [DONE] is missing
                pass
            finally:
                await web.aclose()

        return StreamingResponse(stream(), media_type="text/event-stream")

    routes = [
        Route("/", page),
        Route("/models", models),
        Route("/render", render, methods=["POST"]),
        Route("/complete", complete, methods=["POST"]),
    ]
    # Other sites that the browser visits cannot pose as this one (DNS rebinding).
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    return Starlette(routes=routes, middleware=[hosts])


if __name__ == "__main__":
    run(main)
