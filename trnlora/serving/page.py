"""The side-by-side page: a small web application between the browser and vLLM's server.

Prompts are rendered by trnlora/data/templates.py, with the server's template, and sent as token ids, as in training and
evaluation. The page's requests carry no API key; the application adds it, so it must not be reachable from other
machines.
"""

import contextlib
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from trnlora import paths
from trnlora.data.formats import Message
from trnlora.data.special_tokens import apply_policy
from trnlora.data.templates import PromptTemplate, Segment, tokenize
from trnlora.data.tokenizer import load_tokenizer
from trnlora.errors import UserError
from trnlora.params import Params
from trnlora.readers import checked, parse_json
from trnlora.serving import client
from trnlora.serving.prompts import served_records, served_template
from trnlora.training.adapter_record import GREEDY

PAGE = Path(__file__).with_name("page.html")

Q = TypeVar("Q", bound="Question")


def application(params: Params, url: str) -> Starlette:
    """The page and the three requests it makes: /models, /render and /complete. url: vLLM's server."""
    tokenizer = load_tokenizer(paths.MODEL)
    known: list[PromptTemplate] = []  # the server's template, once it has answered

    def current_template() -> PromptTemplate:
        if not known:
            known.append(served_template(url, params, tokenizer))
        return known[0]

    async def page(_: Request) -> Response:
        return FileResponse(PAGE)

    async def models(_: Request) -> Response:
        known.clear()  # the server may have been restarted with other adapters
        try:
            names = await run_in_threadpool(client.served_models, url, 5)
            template = await run_in_threadpool(current_template)
            records = await run_in_threadpool(served_records, url)
        except UserError as error:
            return JSONResponse({"error": f"{error}"}, 502)
        sampling = next((record.generation for record in records.values()), GREEDY)
        settings = {"temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": params.eval.max_tokens}
        return JSONResponse({"models": names, "template": template.name, "settings": settings})

    async def render(request: Request) -> Response:
        question = await read_as(Question, request)
        try:
            template = await run_in_threadpool(current_template)
            return JSONResponse({"prompt": template.render(tokenizer, [question.message()])})
        except UserError as error:
            return JSONResponse({"error": f"{error}"}, 502)

    async def complete(request: Request) -> Response:
        question = await read_as(CompletionRequest, request)
        settings = question.model_dump(include={"model", "temperature", "top_p", "max_tokens"})
        try:
            template = await run_in_threadpool(current_template)
            messages = apply_policy(params.data.special_tokens, tokenizer, [question.message()])
        except UserError as error:
            return JSONResponse({"error": f"{error}"}, 400)
        [[prompt]] = tokenize(tokenizer, [[Segment(template.render(tokenizer, messages), None)]])
        return await stream_completion(url, settings | {"prompt": prompt})

    routes = [
        Route("/", page),
        Route("/models", models),
        Route("/render", render, methods=["POST"]),
        Route("/complete", complete, methods=["POST"]),
    ]
    # Without this, another site open in the browser could pose as this one (DNS rebinding).
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    return Starlette(routes=routes, middleware=[hosts])


class Question(BaseModel):
    """What the page sends to see a prompt."""

    instruction: str
    context: str

    def message(self) -> Message:
        return Message("user", self.instruction.strip(), self.context.strip())


class CompletionRequest(Question):
    """What it sends for an answer."""

    model: str
    temperature: float
    top_p: float
    max_tokens: int


async def read_as(kind: type[Q], request: Request) -> Q:
    """The body of a request. Raises HTTPException with what is wrong with it."""
    # A browser sends JSON for another site only if the server allows it (CORS), which this one does not: no other
    # site that is open in the browser can ask questions with the key.
    if request.headers.get("Content-Type") != "application/json":
        raise HTTPException(415, "send JSON")
    try:
        text = (await request.body()).decode("utf-8", errors="replace")
        return checked(parse_json(text, "the request"), kind, "the request")
    except UserError as error:
        raise HTTPException(400, str(error)) from None


async def stream_completion(url: str, body: dict[str, Any]) -> Response:
    """vLLM's stream of events as it arrives; if it refuses the request, {"error": one sentence} with status 502."""
    body = body | {"stream": True, "stream_options": {"include_usage": True}}
    web = httpx.AsyncClient(timeout=300, trust_env=False)
    request = web.build_request("POST", f"{url}/v1/completions", json=body, headers=client.headers())
    try:
        reply = await web.send(request, stream=True)
    except httpx.HTTPError as error:
        await web.aclose()
        return JSONResponse({"error": f"{client.no_answer(url, error)}"}, 502)
    if reply.status_code != 200 or not reply.headers.get("Content-Type", "").startswith("text/event-stream"):
        text = (await reply.aread()).decode(errors="replace")
        await web.aclose()
        return JSONResponse({"error": client.refusal(url, reply.status_code, text)}, 502)

    async def events() -> AsyncIterator[bytes]:
        try:
            async for chunk in reply.aiter_raw():
                yield chunk
        except httpx.HTTPError:  # the page notices that the last event, [DONE], is missing, and says so
            pass
        finally:
            await web.aclose()

    return StreamingResponse(events(), media_type="text/event-stream")


@contextlib.contextmanager
def running_server(url: str, command: list[str]) -> Iterator[None]:
    """The server at `url`. If none answers, start one with `command`, and stop it at the end.

    Raises UserError if the started server ends before it answers.
    """
    if answers(url):
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that the server is stopped too
    server = subprocess.Popen(command, start_new_session=True)  # Ctrl-C reaches only this process
    try:
        while not answers(url):
            if server.poll() is not None:
                raise UserError("the server did not start: see the error above")
            time.sleep(0.5)
        yield
    finally:
        server.terminate()
        server.wait()


def answers(url: str) -> bool:
    """Does a server answer at `url`, even if it refuses the request? Then the page shows why."""
    try:
        client.request(url, "/v1/models", timeout=5)
    except client.Unreachable:
        return False
    except UserError:
        pass
    return True
