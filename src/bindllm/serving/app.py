"""The application: routes, the static page, and the layers around them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from bindllm import __version__
from bindllm.errors import EngineBusy
from bindllm.model.decoder import num_positions
from bindllm.serving.answers import Answers
from bindllm.serving.api.chat import KEEP_ALIVE, Neighbors, chat_fields, complete_chat, stream_chat
from bindllm.serving.api.embeddings import embed
from bindllm.serving.api.errors import NO_RETRY, RETRY, ApiError, handle, json_response, unique_keys
from bindllm.serving.api.responses import ResponseWriter, response_fields
from bindllm.serving.api.sampling import Question, check_model, find_neighbors, read_question
from bindllm.serving.api.schema import ChatBody, EmbeddingsBody, ErrorBody, ResponsesBody
from bindllm.serving.config import ServeConfig
from bindllm.serving.engine import Engine
from bindllm.serving.guard import Allowance, ClientLeftError, Guard
from bindllm.serving.metrics import Metrics

Found = TypeVar("Found")

PAGE = Path(__file__).parent / "page"
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
# Threads that embed media outside of the engine, and calls that may wait for them.
_EMBED_THREADS, _EMBED_WAITING = 1, 64
# Threads that read messages: they decode base64, download media and count tokens.
_READ_THREADS = 8
# For the OpenAPI description: every route may answer with them.
_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}


class Endpoints:
    """The functions of all routes.

    Args:
        engine: answers questions, and embeds media.

    Attributes:
        draining: set before the server ends; then no new request is served.
    """

    def __init__(self, engine: Engine, config: ServeConfig) -> None:
        self.draining, self.metrics = False, Metrics(engine)
        self._engine, self._config = engine, config
        self._encoders = _Workers("bindllm-embed", _EMBED_THREADS, waiting=_EMBED_WAITING)
        self._readers = _Workers("bindllm-read", _READ_THREADS, waiting=config.slots + config.queue)
        self._created = int(time.time())

    def router(self) -> APIRouter:
        """Return the routes."""
        router = APIRouter(route_class=_Route, responses=_ERRORS)
        router.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        router.add_api_route("/v1/responses", self.responses, methods=["POST"])
        router.add_api_route("/v1/embeddings", self.embeddings, methods=["POST"])
        for path, function in (
            ("/v1/models", self.models),
            # Names may have slashes, as on the Hugging Face Hub; an unknown one is an error of a model, not of a path.
            ("/v1/models/{name:path}", self.model),
            ("/health", self.health),
            ("/ready", self.ready),
            ("/metrics", self.show_metrics),
        ):
            router.add_api_route(path, function, methods=["GET"])
            # Some probes ask without a body; RFC 9110 wants it wherever GET is.
            router.add_api_route(path, function, methods=["HEAD"], include_in_schema=False)
        return router

    async def models(self) -> Response:
        """List the model of this server."""
        return json_response({"object": "list", "data": [self._describe()]})

    async def model(self, name: str) -> Response:
        """Describe the model of this server."""
        check_model(name, self._config)
        return json_response(self._describe())

    async def chat(self, body: ChatBody, request: HttpRequest) -> Response:
        """Answer a conversation."""
        question = await self._read(request, body, **chat_fields(body))
        options = body.stream_options
        usage = options is not None and bool(options.include_usage)
        return await self._answer(
            request,
            question,
            whole=lambda answers, neighbors: complete_chat(question, answers, neighbors),
            stream=partial(stream_chat, question, usage=usage) if body.stream else None,
        )

    async def responses(self, body: ResponsesBody, request: HttpRequest) -> Response:
        """Answer a conversation, in the form of the Responses API."""
        question = await self._read(request, body, **response_fields(body))

        def stream(answers: Answers, neighbors: Neighbors, first: Any) -> AsyncIterator[bytes]:
            return ResponseWriter(body, question, answers, neighbors).stream(first)

        return await self._answer(
            request,
            question,
            whole=lambda answers, neighbors: ResponseWriter(body, question, answers, neighbors).complete(),
            stream=stream if body.stream else None,
        )

    async def embeddings(self, body: EmbeddingsBody, request: HttpRequest) -> Response:
        """Embed texts and media."""
        left = request.state.allowance.left
        work = self._encoders.run(left, embed, body, self._engine, self._config)
        return json_response(await _unless_client_leaves(request, work))

    async def health(self) -> Response:
        """Tell that the process is alive."""
        return json_response({"status": "ok"})

    async def ready(self) -> Response:
        """Tell whether new requests are served."""
        if self.draining:
            return json_response({"status": "draining"}, 503, RETRY)
        return json_response({"status": "ready"})

    async def show_metrics(self) -> Response:
        """Return the numbers of the server for Prometheus."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _read(self, request: HttpRequest, body: Any, **fields: Any) -> Question:
        """Read a question in a thread: decoding large media and downloads must not stop the streams of others."""
        allowance: Allowance = request.state.allowance
        given = (body, self._engine.model, self._config)
        work = self._readers.run(allowance.left, read_question, *given, **fields)
        question = await _unless_client_leaves(request, work)
        sources = [item.source for group in question.request.conversation.media_groups for item in group]
        allowance.hold(sum(len(source) for source in sources if isinstance(source, bytes)))
        # The rest of the time: its answer must not get the whole of it again.
        return replace(question, request=replace(question.request, timeout=max(allowance.left, 1e-3)))

    async def _answer(
        self,
        request: HttpRequest,
        question: Question,
        *,
        whole: Callable[[Answers, Neighbors], Coroutine[Any, Any, dict[str, Any]]],
        stream: Callable[..., AsyncIterator[bytes]] | None,
    ) -> Response:
        """Submit a question, and return its answer as an object or as a stream."""
        answers = Answers(self._engine, question, self.metrics)
        neighbors = partial(self._neighbors, question, request.state.allowance)
        if stream is None:
            # Leaving the block frees the slots, also if the client has left.
            with answers:
                return json_response(await _unless_client_leaves(request, whole(answers, neighbors)))
        try:
            # Until the first token, an error can still have a status of its own.
            first = await _unless_client_leaves(request, answers.next(KEEP_ALIVE))
        except BaseException:
            answers.cancel()
            raise
        return _EventStream(stream(answers, neighbors, first), answers)

    async def _neighbors(self, question: Question, allowance: Allowance) -> list[list[dict[str, Any]]] | None:
        # Found after the answer: they would delay its first token.
        if not question.wants_neighbors:
            return None
        return await self._encoders.run(allowance.left, find_neighbors, self._engine, question.request)

    def _describe(self) -> dict[str, Any]:
        """Return the entry of the model, with facts that a client cannot ask for otherwise."""
        model = self._engine.model
        return {
            "id": self._config.model,
            "object": "model",
            "created": self._created,
            "owned_by": "bindllm",
            "max_model_len": num_positions(model.decoder.config),
            "modalities": sorted({name for encoder in model.encoders for name in encoder.modalities}),
            "embedding_size": model.encoders[0].embedding_size,
            "has_cache": model.cache is not None,
        }


class _Route(APIRoute):
    """A route whose body has no key twice: Python would take the last one, and programs in front the first."""

    def get_route_handler(self) -> Callable[[HttpRequest], Coroutine[Any, Any, Response]]:
        """Override."""
        handler = super().get_route_handler()

        async def checked(request: HttpRequest) -> Response:
            return await handler(_StrictRequest(request.scope, request.receive))

        return checked


class _StrictRequest(HttpRequest):
    async def json(self) -> Any:
        return json.loads(await self.body(), object_pairs_hook=unique_keys)


class _Workers:
    """A few threads for work that would stop the event loop, and a limited number of calls.

    Args:
        waiting: most calls that run or wait at the same time.
    """

    def __init__(self, name: str, threads: int, *, waiting: int) -> None:
        self._threads, self._most, self._calls = ThreadPoolExecutor(threads, name), waiting, 0

    async def run(self, seconds: float, function: Callable[..., Found], *args: Any, **more: Any) -> Found:
        """Run a function, in the order of the calls.

        Raises:
            EngineBusy: too many calls wait already.
            ApiError: it took longer than some seconds.
        """
        if self._calls >= self._most:
            raise EngineBusy("too many calls wait for the threads that read and encode media")
        self._calls += 1
        # The queue of the pool keeps a call whose client has left, but no longer its arguments, which may be large.
        call = [partial(function, *args, **more)]
        # The error of a client that has left keeps this frame.
        del function, args, more

        def work() -> Found | None:
            return call.pop()() if call else None

        try:
            async with asyncio.timeout(seconds):
                return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except TimeoutError as error:
            message = (
                "the media were not read and encoded within the deadline of this server; send fewer media"
            )
            raise ApiError(504, message, headers=NO_RETRY) from error
        finally:
            call.clear()
            self._calls -= 1


def build_app(engine: Engine, config: ServeConfig) -> FastAPI:
    """Return the application; ``app.state.endpoints`` are its `Endpoints`."""
    endpoints = Endpoints(engine, config)
    # Without the interactive docs, which load scripts of another site.
    # Without redirects too: their target would be made of the Host header.
    app = FastAPI(title="bindllm", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    # The server sets its `draining`.
    app.state.endpoints = endpoints
    app.include_router(endpoints.router())
    page = page_files()
    for path, file in page.items():
        # A plain route, which answers HEAD too.
        app.add_route(path, partial(_page_file, file), include_in_schema=False)
    # Errors outside of these reach the guard, which answers them in the same shape.
    for error in (HTTPException, RequestValidationError):
        app.add_exception_handler(error, handle)
    app.add_middleware(
        Guard,
        config=config,
        page=page,
        metrics=endpoints.metrics,
        is_draining=lambda: endpoints.draining,
    )
    return app


def page_files() -> dict[str, tuple[bytes, str]]:
    """Return content and media type of each file of the static page, by its path; read once, so no path is opened."""
    files = sorted(file for file in PAGE.glob("*") if file.suffix in _MEDIA_TYPES)
    found = {f"/{file.name}": (file.read_bytes(), _MEDIA_TYPES[file.suffix]) for file in files}
    return found | ({"/": found["/index.html"]} if "/index.html" in found else {})


async def _page_file(file: tuple[bytes, str], request: HttpRequest) -> Response:
    # Asked for again after an update of the server.
    return Response(file[0], media_type=file[1], headers={"cache-control": "no-cache"})


class _EventStream(StreamingResponse):
    """A stream of events that frees its slots however it ends, also if it never started."""

    def __init__(self, events: AsyncIterator[bytes], answers: Answers) -> None:
        # The header keeps nginx from collecting the pieces.
        super().__init__(events, media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._answers:
            await super().__call__(scope, receive, send)


async def _unless_client_leaves(request: HttpRequest, work: Awaitable[Found]) -> Found:
    """Return the result of work, which is cancelled if the client closes its connection.

    Raises:
        ClientLeftError: it did.
    """
    # Only the messages of a connection say that its client has left; nothing cancels the function of a route.
    task, left = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        # Both may be done; then the result is worth more.
        if not task.done():
            raise ClientLeftError
        return task.result()
    finally:
        task.cancel()
        left.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
