"""The HTTP endpoint as an ASGI application: routes, limits, keys."""

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from anyio.to_thread import run_sync
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from gircse.runtime import Embedder, GircseError
from gircse.runtime.batch_planner import DEFAULT_BATCH_TOKENS
from gircse.serving.api_errors import ApiError
from gircse.serving.batching import DEFAULT_QUEUE_TOKENS, Batcher, Embedded, QueueFullError, Texts
from gircse.serving.embeddings_api import EmbeddingApi, parse_request
from gircse.serving.metrics import Metrics, Recorder

logger = logging.getLogger(__name__)

DEFAULT_BODY_BYTES = 16 << 20
CLIENT_CLOSED_REQUEST = 499
"""Status in the metrics of a request whose client went away, as nginx has it."""

LARGE_ANSWER = 16
"""Texts of an answer that is written in a thread: more would hold up the event loop."""


@dataclass(frozen=True)
class ServerOptions:
    """How a bundle is served.

    Attributes:
        model: its name in requests and answers.
        batch_tokens: most tokens of a batch, padding included.
        queue_tokens: most tokens that wait.
        body_bytes: of the largest request.
        api_keys: one of which ``/v1`` asks for; none lets everybody in.
        accept_token_ids: take token ids of the model's own tokenizer.
        allow_dimensions: cut vectors to the ``dimensions`` of a request.
    """

    model: str
    batch_tokens: int = DEFAULT_BATCH_TOKENS
    queue_tokens: int = DEFAULT_QUEUE_TOKENS
    body_bytes: int = DEFAULT_BODY_BYTES
    api_keys: Sequence[str] = ()
    accept_token_ids: bool = False
    allow_dimensions: bool = False


def create_app(embedder: Embedder, options: ServerOptions, *, recorder: Recorder | None = None) -> Starlette:
    """Return the application that serves a bundle.

    Args:
        embedder: of the bundle; stays open when the application ends.
        options: how.
        recorder: counts what it does; only what ``Metrics``, the default, has counted is shown at ``/metrics``.
    """
    return _Server(embedder, options, recorder or Metrics()).app


class _Server:
    def __init__(self, embedder: Embedder, options: ServerOptions, recorder: Recorder) -> None:
        self._embedder, self._options = embedder, options
        self._api = EmbeddingApi(
            embedder,
            options.model,
            accept_token_ids=options.accept_token_ids,
            allow_dimensions=options.allow_dimensions,
        )
        self._recorder = recorder
        self._batcher: Batcher
        self._started = int(time.time())
        routes = [
            Route("/v1/embeddings", self._embeddings, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{model:path}", self._model),
            Route("/health", self._health),
            Route("/", self._page),
        ]
        if isinstance(recorder, Metrics):
            routes.append(Route("/metrics", _metrics_page(recorder)))
        self.app = Starlette(
            routes=routes,
            exception_handlers={
                ApiError: _api_error,
                HTTPException: _http_error,
                GircseError: _failed_batch,
                Exception: _server_error,
            },
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self._batcher = Batcher(
            self._embedder,
            batch_tokens=self._options.batch_tokens,
            queue_tokens=self._options.queue_tokens,
            observer=self._recorder,
        )
        try:
            yield
        finally:
            await run_sync(self._batcher.close)

    async def _embeddings(self, request: Request) -> Response:
        status = 500
        begun = time.perf_counter()
        try:
            response = await self._answer(request)
            status = response.status_code
        except ApiError as err:
            status = err.status
            raise
        except ClientDisconnect:
            status = CLIENT_CLOSED_REQUEST
            response = Response(status_code=status)  # nobody reads it
        except asyncio.CancelledError:  # how Ray Serve says the same
            status = CLIENT_CLOSED_REQUEST
            raise
        finally:
            self._recorder.answered(status)
        self._recorder.took("total", time.perf_counter() - begun)
        return response

    async def _answer(self, request: Request) -> Response:
        self._check_key(request)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the Content-Type is not application/json")
        asked = parse_request(await self._body(request))
        begun = time.perf_counter()
        prepared = await run_sync(self._api.prepare, asked)
        self._recorder.took("tokenize", time.perf_counter() - begun)
        embedded = await self._embed(request, prepared.texts)
        self._recorder.took("queue", embedded.queue_seconds)
        self._recorder.took("run", embedded.run_seconds)
        texts = len(prepared.texts.token_ids)
        self._recorder.embedded(texts, prepared.texts.tokens, prepared.cut)
        arguments = (asked, prepared, embedded.vectors)
        body = await run_sync(self._api.answer, *arguments) if texts > LARGE_ANSWER else self._api.answer(*arguments)
        headers = {"X-Truncated-Texts": str(prepared.cut)} if prepared.cut else None
        return Response(body, media_type="application/json", headers=headers)

    async def _body(self, request: Request) -> bytes:
        most = self._options.body_bytes
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise ApiError(413, f"the body has more than {most} bytes", code="request_too_large")
        return bytes(body)

    async def _embed(self, request: Request, texts: Texts) -> Embedded:
        """Wait for the vectors, as long as the client does.

        Raises:
            ApiError: the queue is full, or smaller than the request.
            ClientDisconnect: the client went away; its texts have left the queue.
        """
        if texts.tokens > self._batcher.queue_tokens:
            raise ApiError(
                413,
                f"the texts have {texts.tokens} tokens; the server queues {self._batcher.queue_tokens}. Send fewer",
                param="input",
                code="request_too_large",
            )
        try:
            future = asyncio.wrap_future(self._batcher.submit(texts))
        except QueueFullError as err:
            headers = {"Retry-After": str(err.retry_seconds)}
            raise ApiError(429, str(err), code="queue_full", headers=headers) from err
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            either: tuple[asyncio.Future[Any], ...] = (future, gone)
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not future.done():
                raise ClientDisconnect
            return future.result()
        finally:
            future.cancel()
            gone.cancel()

    def _check_key(self, request: Request) -> None:
        keys = self._options.api_keys
        if not keys:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Every key is compared, each in constant time, so that the time tells nothing.
        known = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in keys]
        if scheme.lower() != "bearer" or not any(known):
            raise ApiError(
                401,
                "there is no valid API key: send Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _models(self, request: Request) -> Response:
        self._check_key(request)
        return JSONResponse({"object": "list", "data": [self._description()]})

    async def _model(self, request: Request) -> Response:
        self._check_key(request)
        if request.path_params["model"] != self._options.model:
            raise ApiError(404, f"the model here is {self._options.model}", code="model_not_found")
        return JSONResponse(self._description())

    def _description(self) -> dict[str, Any]:
        embedder = self._embedder
        return {
            "id": self._options.model,
            "object": "model",
            "created": self._started,
            "owned_by": "gircse",
            "dimensions": embedder.embedding_dimension,
            "max_tokens": embedder.max_tokens,
            "steps": embedder.steps,
            "precision": embedder.precision,
            "provider": embedder.provider,
            "query_instruction": embedder.manifest.query_instruction,
        }

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _page(self, _: Request) -> Response:
        return HTMLResponse(files("gircse.serving").joinpath("page.html").read_text(encoding="utf-8"))


def _metrics_page(metrics: Metrics) -> Callable[[Request], Awaitable[Response]]:
    async def page(_: Request) -> Response:
        return Response(metrics.text(), media_type=metrics.content_type)

    return page


async def _disconnected(request: Request) -> None:
    """Return when the client goes away; its request was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _api_error(_: Request, err: Exception) -> Response:
    assert isinstance(err, ApiError)
    return JSONResponse(err.body, status_code=err.status, headers=err.headers)


async def _http_error(request: Request, err: Exception) -> Response:
    """Answer what Starlette refuses, such as a path that is not there."""
    assert isinstance(err, HTTPException)
    error = ApiError(
        err.status_code, f"{err.detail}: {request.method} {request.url.path}", headers=dict(err.headers or {})
    )
    return await _api_error(request, error)


async def _failed_batch(request: Request, err: Exception) -> Response:
    """Answer where a batch failed, most likely for want of memory."""
    logger.error("%s", err)
    return await _server_error(request, err)


async def _server_error(request: Request, _: Exception) -> Response:
    return await _api_error(request, ApiError(500, "the server failed; its log says why"))
