"""The routes: OpenAI's API, health, metrics and the page."""

import asyncio
import time
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from pipeline.endpoint.api import ChatCompletion, ChatRequest, ErrorBody, ModelCard, ModelList
from pipeline.endpoint.budget import Take
from pipeline.endpoint.chat import ChatService
from pipeline.endpoint.client import EngineStatus, EngineUnavailable
from pipeline.endpoint.completions import stream, unless_gone, whole
from pipeline.endpoint.errors import ApiError, internal_error, unavailable
from pipeline.endpoint.explain import validation_error
from pipeline.endpoint.guard import CHAT_PATH, Completions, Guard
from pipeline.endpoint.keys import ApiKeys
from pipeline.endpoint.metrics import Metrics
from pipeline.page import load_page

STATUS_TIMEOUT_S = 2.0
EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 405, 408, 413, 415, 429, 500, 503, 504)
}
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}


def create_app(service: ChatService, keys: ApiKeys | None) -> ASGIApp:
    """Put the endpoint together. It is Ray-free: `service.client` knows where the engines are."""
    metrics = Metrics()
    app = FastAPI(title="smolvlm", docs_url=None, redoc_url=None, redirect_slashes=False, responses=REFUSALS)
    _document_completions(app)
    _add_models(app, service)
    _add_operation(app, service, metrics)
    _add_errors(app)
    options = service.options
    return Guard(app, _completions(service, metrics), keys, not options.insecure, options.limits, metrics)


def _completions(service: ChatService, metrics: Metrics) -> Completions:
    """What answers the bytes of a body. It stands beside FastAPI, whose layers take as long as the reading, and which
    would make plain objects of a picture's megabyte of base64 before it makes a ChatRequest."""

    async def answer(body: bytes, request: Request, take_tiles: Take) -> Response:
        chat = _read(body)
        answering = stream if chat.stream else whole
        return await unless_gone(request, answering(service, chat, take_tiles, metrics), metrics)

    return answer


def _read(body: bytes) -> ChatRequest:
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise validation_error(error.errors(include_url=False, include_input=False), body) from None


def _document_completions(app: FastAPI) -> None:
    @app.post(CHAT_PATH, response_model=ChatCompletion, responses=STREAMED)
    async def chat_completions(body: ChatRequest) -> Response:
        """Answer a conversation; with `stream` as server-sent events."""
        raise AssertionError("the guard has these answered before they come here")


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
