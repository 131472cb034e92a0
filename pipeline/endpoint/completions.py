"""Answers as OpenAI's API gives them: one object, or a stream of chunks."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from pipeline.endpoint.api import ChatRequest
from pipeline.endpoint.budget import Take
from pipeline.endpoint.chat import Chat, ChatService, Piece
from pipeline.endpoint.errors import ApiError
from pipeline.endpoint.metrics import Metrics

WATCH_AFTER_S = 0.01
TO_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
FINISH_REASONS = {"repetition": "length"}  # OpenAI's API has no word for an answer that went in circles


async def whole(service: ChatService, body: ChatRequest, take_tiles: Take, metrics: Metrics) -> Response:
    """Answer with one object. Raises ApiError."""
    chat, engine_request = await service.prepare(body, take_tiles)
    texts = [""] * chat.num_choices
    tokens: list[list[dict[str, Any]]] = [[] for _ in texts]
    pieces = service.answer(chat, engine_request)
    del engine_request
    async with aclosing(pieces):
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
    answer = {**common, "choices": choices, "usage": chat.usage, "smolvlm": chat.own}
    return Response(TO_JSON.encode(answer), media_type="application/json")


async def stream(service: ChatService, body: ChatRequest, take_tiles: Take, metrics: Metrics) -> Response:
    """Answer with server-sent events. Raises ApiError.

    The response begins with the first piece, so that what goes wrong before it has a status of its own.
    """
    chat, engine_request = await service.prepare(body, take_tiles)
    pieces = service.answer(chat, engine_request)
    del engine_request
    first = await anext(pieces)
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    events = _events(service, chat, first, pieces, metrics)
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


async def _events(
    service: ChatService, chat: Chat, first: Piece, pieces: AsyncGenerator[Piece], metrics: Metrics
) -> AsyncIterator[str]:
    async with aclosing(pieces):
        try:
            for index in range(chat.num_choices):
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
    return {**chunk, "smolvlm": chat.own} if chat.is_finished and not _includes_usage(chat) else chunk


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
    return f"data: {TO_JSON.encode(content)}\n\n"


def _reason(reason: str) -> str:
    return FINISH_REASONS.get(reason, reason)


def _count(chat: Chat, metrics: Metrics) -> None:
    metrics.prompt_tokens.inc(chat.num_prompt_tokens)
    metrics.output_tokens.inc(chat.num_output_tokens)
    if chat.first_token is not None:
        metrics.first_token.observe(chat.first_token - chat.started)


async def unless_gone(request: Request, answering: Coroutine[Any, Any, Response], metrics: Metrics) -> Response:
    """Wait for an answer, but no longer than its client does: Starlette notices that it has left only while a stream
    is under way."""
    try:
        async with asyncio.timeout(None) as patience:
            with _watching(request, patience):
                return await answering
    except TimeoutError:
        if not patience.expired():
            raise
        metrics.disconnects.inc()
        return Response(status_code=499)  # nobody reads it


@contextmanager
def _watching(request: Request, patience: asyncio.Timeout) -> Iterator[None]:
    """Begin after a while: until then the request is being read, from then on the engine's time is free."""
    tasks: list[asyncio.Task[None]] = []
    loop = asyncio.get_running_loop()
    begin = loop.call_later(WATCH_AFTER_S, lambda: tasks.append(loop.create_task(_end_when_gone(request, patience))))
    try:
        yield
    finally:
        begin.cancel()
        for task in tasks:
            task.cancel()


async def _end_when_gone(request: Request, patience: asyncio.Timeout) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    patience.reschedule(0.0)
