"""The OpenAI-compatible server as an ASGI application.

    app = make_app(served, worker, Access(keys=("secret",)))

Rendering and encoding run on a small pool of threads; the event loop only moves deltas.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, TypeVarTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from internlm import __version__
from internlm.errors import InternLMError
from internlm.infer.engine import Engine
from internlm.infer.worker import Busy, Worker
from internlm.serve import web
from internlm.serve.api import asked, problems, schema, structure
from internlm.serve.api.asked import Asked, Served
from internlm.serve.api.gate import Access, Gate
from internlm.serve.api.inbox import Gone, Inbox, Ticket, unless_gone
from internlm.serve.api.metrics import Metrics
from internlm.serve.api.problems import ApiError
from internlm.serve.api.replies import Chunk, Reply

logger = logging.getLogger(__name__)

_Body = TypeVar("_Body", bound=schema.Sampling)
_Found = TypeVar("_Found")
_Given = TypeVarTuple("_Given")
_PAGE_HEADERS = {"Cache-Control": "no-cache", "X-Frame-Options": "DENY"}
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.ErrorAnswer} for status in (400, 401, 403, 404, 405, 408, 413, 429, 500, 503)
}
_ID_BYTES = 8
"""Of an id in JSON, `123456, `."""
_LEAST_BODY_BYTES, _MOST_BODY_BYTES = 2**20, 2**22
_UNREAD_SECONDS = 120.0
"""How long a client may read nothing of a stream."""
_GONE = 499
"""What the log of a proxy says of a client that went away; nobody receives it."""


class Service:
    """What the routes call: a model, the worker of its engine, and what is measured."""

    def __init__(self, served: Served, worker: Worker) -> None:
        self.served, self.worker, self.metrics = served, worker, Metrics()
        self.inbox = Inbox(worker, self.metrics)
        self.pool = ThreadPoolExecutor(4, thread_name_prefix="prompt")
        self.compilers = ThreadPoolExecutor(2, thread_name_prefix="grammar")
        self.grammars = structure.Grammars(served.engine)
        self._preparing = 0

    async def ask(
        self, function: Callable[[Served, _Body, structure.Compile], Asked], body: _Body, request: Request
    ) -> Response:
        """Return the response to a request of the engine; compiling a grammar for one holds up no other.

        Raises:
            ApiError: it cannot be done.
            Busy: as `prepare`.
            Gone: the client has closed the connection before its grammar was compiled.
        """
        try:
            found = await self.prepare(function, self.served, body, self.grammars.known)
        except structure.Later:
            slow = self.prepare(function, self.served, body, self.grammars.compile, pool=self.compilers)
            found = await unless_gone(slow, request.receive)
        return await self._respond(found, request)

    async def prepare(
        self, function: Callable[[*_Given], _Found], *given: *_Given, pool: ThreadPoolExecutor | None = None
    ) -> _Found:
        """Return what a function gives, run off the event loop.

        Raises:
            Busy: as many wait for that as may be answered at once. Each of them holds its whole body.
        """
        if self._preparing >= self.worker.capacity:
            raise Busy(f"{self._preparing} prompts wait to be read, which is the limit", do="Try again later.")
        self._preparing += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(pool or self.pool, function, *given)
        finally:
            self._preparing -= 1

    async def _respond(self, asked: Asked, request: Request) -> Response:
        most = self.worker.capacity
        if sum(one.n for one in asked.requests) > most and len(asked.requests) > 1:
            raise ApiError(f"prompt: over {most} answers at once are too many for this server", param="prompt")
        reply = Reply(self.served, asked)
        ticket = self.inbox.open(asked.requests)
        ticket.watch(request.receive)
        if asked.stream:
            return _Stream(self._events(ticket, reply), ticket)
        try:
            async for mail in ticket:
                for place, delta in mail:
                    reply.add(place, delta)
                if reply.is_settled:
                    ticket.abort()
            return _json(reply.whole())
        finally:
            ticket.close()

    async def _events(self, ticket: Ticket, reply: Reply) -> AsyncIterator[bytes]:
        """Yield the events of a stream; it ends with [DONE], unless the client has gone."""
        try:
            for chunk in reply.opening():
                yield _event(chunk)
            async for mail in ticket:
                if not mail:
                    yield b": the answer is being written\n\n"
                for place, delta in mail:
                    for chunk in reply.chunks(place, delta):
                        yield _event(chunk)
                if reply.is_settled:
                    ticket.abort()
            for chunk in reply.closing():
                yield _event(chunk)
        except Gone:
            return
        except Exception as error:
            if not isinstance(error, ApiError):
                logger.exception("a stream failed")
                error = ApiError(problems.DEFECT, status=500, code="engine_error")
            self.metrics.errors[500] += 1
            yield b"data: " + problems.body_of(error) + b"\n\n"
        yield b"data: [DONE]\n\n"


class _Stream(StreamingResponse):
    """A stream of events; however it ends, and even if it never began, its ticket is closed."""

    def __init__(self, events: AsyncIterator[bytes], ticket: Ticket) -> None:
        super().__init__(events, headers=_STREAM_HEADERS, media_type="text/event-stream")
        self.ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_soon(event: Message) -> None:
            async with asyncio.timeout(_UNREAD_SECONDS):
                await send(event)

        try:
            await super().__call__(scope, receive, send_soon)
        except (TimeoutError, ClientDisconnect):
            logger.warning("warning: a client reads its stream no more: it is closed")
        finally:
            self.ticket.close()


def make_app(served: Served, worker: Worker, access: Access) -> FastAPI:
    """Return the application."""
    service = Service(served, worker)
    app = FastAPI(
        title="internlm",
        version=__version__,
        description="OpenAI-compatible API",
        responses=_ERRORS,
        docs_url=None,  # FastAPI's pages run scripts of a foreign server, in the origin of the chat page and its key
        redoc_url=None,
    )
    app.state.service = service
    for add in (_add_answers, _add_models, _add_texts, _add_operations):
        add(app, service)
    open_paths = {"/health", "/ready", *_add_page(app)}
    _add_handlers(app)
    _correct_schema(app, open_paths if access.keys else None)
    body_bytes = _body_bytes(served.engine)
    app.add_middleware(Gate, access=access, body_bytes=body_bytes, open_paths=open_paths, metrics=service.metrics)
    if access.origins:  # outside the gate: a browser's question beforehand (OPTIONS) has no key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(access.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    return app


def _body_bytes(engine: Engine) -> int:
    """Return how many bytes a request may have: those of as many prompts of ids as are answered at once.

    Bounded, as the event loop parses the body in one go (0.1 to 0.4 s a MiB on a 2-core x86 server).
    """
    prompt = _ID_BYTES * engine.length
    return max(_LEAST_BODY_BYTES, prompt, min(prompt * engine.limits.batch, _MOST_BODY_BYTES))


def _add_answers(app: FastAPI, service: Service) -> None:
    streams: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

    @app.post("/v1/chat/completions", response_model=schema.ChatAnswer, responses=streams)
    async def chat(body: schema.ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await service.ask(asked.ask_chat, body, request)

    @app.post("/internlm/chat/completions", response_model=schema.ChatAnswer, responses=streams)
    async def legacy(body: schema.LegacyChatRequest, request: Request) -> Response:
        """Answer a conversation; `max_length` counts the prompt's tokens too."""
        return await service.ask(asked.ask_chat, body, request)

    @app.post("/v1/completions", response_model=schema.CompletionAnswer, responses=streams)
    async def complete(body: schema.CompletionRequest, request: Request) -> Response:
        """Go on with texts."""
        return await service.ask(asked.ask_completion, body, request)


def _add_models(app: FastAPI, service: Service) -> None:
    served = service.served

    def card(name: str) -> schema.ModelCard:
        own, length = served.names[0], served.engine.length
        return schema.ModelCard(id=name, created=served.created, root=own, max_model_len=length)

    @app.get("/v1/models")
    @app.get("/internlm/models", operation_id="legacy_models")
    async def models() -> schema.ModelList:
        """List the names that the model answers to."""
        return schema.ModelList(data=[card(name) for name in served.names])

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> schema.ModelCard:
        """Describe one of them."""
        return card(served.check_name(name))


def _add_texts(app: FastAPI, service: Service) -> None:
    served = service.served

    def tokenize_now(body: schema.TokenizeRequest) -> schema.TokenizeAnswer:
        ids = asked.ask_ids(served, body)
        names = None
        if body.return_token_strs:
            names = [served.tokenizer.token_bytes(id_, skip_special=False).decode("utf-8", "replace") for id_ in ids]
        return schema.TokenizeAnswer(count=len(ids), max_model_len=served.engine.length, tokens=ids, token_strs=names)

    @app.post("/tokenize")
    async def tokenize(body: schema.TokenizeRequest) -> schema.TokenizeAnswer:
        """Return the ids of a text or of a conversation."""
        served.check_name(body.model)
        return await service.prepare(tokenize_now, body)

    @app.post("/detokenize")
    async def detokenize(body: schema.DetokenizeRequest) -> schema.DetokenizeAnswer:
        """Return the text of ids, special tokens by name."""
        served.check_name(body.model)
        return schema.DetokenizeAnswer(prompt=await service.prepare(served.tokenizer.decode, body.tokens))

    def ids_of(text: str, body: schema.EncodeRequest) -> list[int]:
        if not body.do_preprocess:
            return asked.encode_text(served, text, special=body.add_bos)
        turn = schema.ChatMessage(role="user", content=text)
        return asked.render_chat(served, schema.ChatRequest(messages=[turn]))[0]

    def encode_now(body: schema.EncodeRequest) -> schema.EncodeAnswer:
        if isinstance(body.input, str):
            ids = ids_of(body.input, body)
            return schema.EncodeAnswer(input_ids=ids, length=len(ids))
        found = [ids_of(text, body) for text in body.input]
        return schema.EncodeAnswer(input_ids=found, length=[len(ids) for ids in found])

    @app.post("/v1/encode")
    async def encode(body: schema.EncodeRequest) -> schema.EncodeAnswer:
        """Return the ids of texts, under LMDeploy's names."""
        return await service.prepare(encode_now, body)


def _add_operations(app: FastAPI, service: Service) -> None:
    def state(ready: bool) -> Response:
        health, stats = service.worker.health, service.worker.stats
        good = health.is_good and not (ready and health.draining)
        facts = {"status": "ok" if good else "unavailable", **vars(health)}
        return _json({**facts, "running": stats.running, "waiting": stats.waiting}, 200 if good else 503)

    @app.get("/health")
    async def health() -> Response:
        """Say whether the engine works."""
        return state(ready=False)

    @app.get("/ready")
    async def ready() -> Response:
        """Say whether new requests are taken."""
        return state(ready=True)

    text: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @app.get("/metrics", response_class=Response, responses=text)
    async def metrics() -> Response:
        """Return all figures in Prometheus' text format."""
        figures = service.metrics.text(service.worker)
        return Response(figures, media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_page(app: FastAPI) -> list[str]:
    """Serve the files of the chat page, each by its own route, and return their paths."""
    files = web.files()
    for path, file in files.items():
        response = Response(file.content, media_type=file.kind, headers=_PAGE_HEADERS)
        app.router.routes.append(Route(path, response, methods=["GET"], include_in_schema=False))
    return list(files)


def _correct_schema(app: FastAPI, open_paths: Collection[str] | None) -> None:
    """Leave 422 out of the OpenAPI schema: a body that does not fit gets 400, with our error object.

    All but the open paths need a key; None: there is none.
    """
    make = app.openapi

    def corrected() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = make()
            for path, operations in found["paths"].items():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
                    if open_paths is not None and path not in open_paths:
                        operation["security"] = [{"key": []}]
            if open_paths is not None:
                found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for name in ("HTTPValidationError", "ValidationError"):
                found["components"]["schemas"].pop(name, None)
        return make()

    app.openapi = corrected  # type: ignore[method-assign]


def _add_handlers(app: FastAPI) -> None:

    def told(error: ApiError, headers: dict[str, str] | None = None) -> Response:
        return Response(problems.body_of(error), error.status, media_type="application/json", headers=headers)

    @app.exception_handler(InternLMError)
    async def ours(request: Request, error: InternLMError) -> Response:
        return told(problems.from_error(error))

    @app.exception_handler(Gone)
    async def gone(request: Request, error: Gone) -> Response:
        return Response(status_code=_GONE)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return told(problems.from_validation(error.errors(), error.body))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        text = {404: "there is nothing here", 405: "this method is not allowed here"}.get(error.status_code)
        about = f"{request.method} {request.url.path}: {text or error.detail}"
        allowed = {key: value for key, value in (error.headers or {}).items() if key.lower() == "allow"}
        return told(ApiError(about, status=error.status_code), allowed)


def _json(content: Any, status: int = 200) -> Response:
    body = json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    return Response(body, status, media_type="application/json")


def _event(chunk: Chunk) -> bytes:
    return b"data: " + json.dumps(chunk, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"
