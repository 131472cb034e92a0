"""The routes: OpenAI's API, health, metrics and the page."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from pipeline.endpoint.api import ChatCompletion, ChatRequest, ErrorBody, ModelCard, ModelList
from pipeline.endpoint.chat import Chat, ChatService, Piece
from pipeline.endpoint.client import EngineStatus, EngineUnavailable
from pipeline.endpoint.errors import ApiError, internal_error, unavailable
from pipeline.endpoint.explain import validation_error
from pipeline.endpoint.guard import Guard
from pipeline.endpoint.keys import ApiKeys
from pipeline.endpoint.metrics import Metrics
from pipeline.page import load_page

STATUS_TIMEOUT_S = 2.0
EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 405, 408, 413, 415, 429, 500, 503, 504)
}
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}
FINISH_REASONS = {"repetition": "length"}  # OpenAI's API has no word for an answer that went in circles


def create_app(service: ChatService, keys: ApiKeys | None) -> ASGIApp:
    """Put the endpoint together. It is Ray-free: `service.client` knows where the engines are."""
    metrics = Metrics()
    app = FastAPI(title="smolvlm", docs_url=None, redoc_url=None, redirect_slashes=False, responses=REFUSALS)
    _add_completions(app, service, metrics)
    _add_models(app, service)
    _add_operation(app, service, metrics)
    _add_errors(app)
    options = service.options
    return Guard(app, keys, not options.insecure, options.limits, metrics)


def _add_completions(app: FastAPI, service: ChatService, metrics: Metrics) -> None:
    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAMED)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation; with `stream` as server-sent events."""
        answering = _stream if body.stream else _whole
        return await _unless_gone(request, answering(service, body, metrics), metrics)


def _add_models(app: FastAPI, service: ChatService) -> None:
    card = ModelCard(id=service.options.model_name, created=int(time.time()))

    @app.get("/v1/models")
    async def list_models() -> ModelList:
        return ModelList(data=[card])

    @app.get("/v1/models/{model:path}")
    async def get_model(model: str) -> ModelCard:
        if model != card.id:
            raise ApiError(404, "model_not_found", f"the model does not exist; this endpoint serves {card.id}", "model")
        return card


def _add_operation(app: FastAPI, service: ChatService, metrics: Metrics) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """The gateway runs."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """An engine answers."""
        if not any(status.stats["alive"] for status in await _statuses(service)):
            raise unavailable()
        return {"status": "ready"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        return Response(metrics.render(await _statuses(service)), media_type=EXPOSITION)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        found = load_page()
        return Response(found.html, headers=found.headers)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def refused(_: Request, error: RequestValidationError) -> JSONResponse:
        return validation_error(error.errors(), error.body).response()

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        code, message = {
            404: ("not_found", "no such route"),
            405: ("method_not_allowed", "this route does not take that method"),
        }.get(error.status_code, ("invalid_json", "the body must be a JSON object"))
        return ApiError(error.status_code, code, message).response(error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, _: Exception) -> JSONResponse:
        return internal_error(request.state.request_id).response()


async def _statuses(service: ChatService) -> list[EngineStatus]:
    try:
        async with asyncio.timeout(STATUS_TIMEOUT_S):
            return await service.client.statuses()
    except (EngineUnavailable, TimeoutError):
        return []


async def _whole(service: ChatService, body: ChatRequest, metrics: Metrics) -> Response:
    chat = await service.prepare(body)
    texts = [""] * chat.engine_request.n
    tokens: list[list[dict[str, Any]]] = [[] for _ in texts]
    async with aclosing(service.answer(chat)) as pieces:
        async for piece in pieces:
            texts[piece.index] += piece.text
            tokens[piece.index] += [token.to_json(service.token_bytes) for token in piece.tokens]
    _count(chat, metrics)
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text},
            "logprobs": {"content": tokens[index]} if body.logprobs else None,
            "finish_reason": _reason(chat.finish_reasons[index]),
        }
        for index, text in enumerate(texts)
    ]
    common = {"id": chat.id, "object": "chat.completion", "created": chat.created, "model": body.model}
    return JSONResponse({**common, "choices": choices, "usage": chat.usage, "smolvlm": chat.own})


async def _stream(service: ChatService, body: ChatRequest, metrics: Metrics) -> Response:
    """The response begins with the first piece, so that what goes wrong before it has a status of its own."""
    chat = await service.prepare(body)
    pieces = service.answer(chat)
    first = await anext(pieces)
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    events = _events(service, chat, first, pieces, metrics)
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


async def _events(
    service: ChatService, chat: Chat, first: Piece, pieces: AsyncGenerator[Piece], metrics: Metrics
) -> AsyncIterator[str]:
    async with aclosing(pieces):
        try:
            for index in range(chat.engine_request.n):
                yield _event(_chunk(chat, _delta(index, {"role": "assistant", "content": ""})))
            yield _event(_piece_chunk(service, chat, first))
            async for piece in pieces:
                yield _event(_piece_chunk(service, chat, piece))
        except ApiError as error:
            yield _event(error.content)
            return
        except (asyncio.CancelledError, GeneratorExit):
            metrics.disconnects.inc()
            raise
    _count(chat, metrics)
    if _includes_usage(chat):
        yield _event({**_chunk(chat), "usage": chat.usage, "smolvlm": chat.own})
    yield "data: [DONE]\n\n"


def _piece_chunk(service: ChatService, chat: Chat, piece: Piece) -> dict[str, Any]:
    logprobs = {"content": [token.to_json(service.token_bytes) for token in piece.tokens]} if piece.tokens else None
    reason = None if piece.finish_reason is None else _reason(piece.finish_reason)
    chunk = _chunk(chat, _delta(piece.index, {"content": piece.text} if piece.text else {}, logprobs, reason))
    is_last = len(chat.finish_reasons) == chat.engine_request.n and not _includes_usage(chat)
    return {**chunk, "smolvlm": chat.own} if is_last else chunk


def _chunk(chat: Chat, *choices: dict[str, Any]) -> dict[str, Any]:
    common = {"id": chat.id, "object": "chat.completion.chunk", "created": chat.created, "model": chat.request.model}
    return {**common, "choices": choices, **({"usage": None} if _includes_usage(chat) else {})}


def _includes_usage(chat: Chat) -> bool:
    return chat.request.stream_options is not None and chat.request.stream_options.include_usage


def _delta(
    index: int, delta: dict[str, str], logprobs: dict[str, Any] | None = None, reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _reason(reason: str) -> str:
    return FINISH_REASONS.get(reason, reason)


def _count(chat: Chat, metrics: Metrics) -> None:
    metrics.tokens.labels("prompt").inc(chat.usage["prompt_tokens"])
    metrics.tokens.labels("completion").inc(chat.usage["completion_tokens"])
    if chat.first_token is not None:
        metrics.first_token.observe(chat.first_token - chat.started)


async def _unless_gone(request: Request, answering: Coroutine[Any, Any, Response], metrics: Metrics) -> Response:
    """Stop working for a client that has left; Starlette notices that by itself only once a stream has begun."""
    work = asyncio.ensure_future(answering)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            metrics.disconnects.inc()
            return Response(status_code=499)  # nobody reads it
        return await work
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
