"""The routes: OpenAI's API, health, metrics and the page."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from pipeline.endpoint.api import ChatCompletion, ChatRequest, ErrorBody, ModelCard, ModelList
from pipeline.endpoint.chat import ChatService
from pipeline.endpoint.client import EngineStatus, EngineUnavailable
from pipeline.endpoint.completions import stream, unless_gone, whole
from pipeline.endpoint.errors import ApiError, internal_error, unavailable
from pipeline.endpoint.explain import validation_error
from pipeline.endpoint.guard import CHAT_PATH, Guard
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
    _add_completions(app, service, metrics)
    _add_models(app, service)
    _add_operation(app, service, metrics)
    _add_errors(app)
    options = service.options
    return Guard(app, keys, not options.insecure, options.limits, metrics)


class ChatRoute(APIRoute):
    """Reads the bytes of a body straight into a ChatRequest: a picture's megabyte of base64 is gone through once.
    FastAPI would make plain objects of it first, and knows the signature for its OpenAPI document only."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def answer(request: Request) -> Response:
            response: Response = await self.endpoint(_read(await request.body()), request)
            return response

        return answer


def _read(body: bytes) -> ChatRequest:
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise validation_error(error.errors(include_url=False, include_input=False), body) from None


def _add_completions(app: FastAPI, service: ChatService, metrics: Metrics) -> None:
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation; with `stream` as server-sent events."""
        answering = stream if body.stream else whole
        return await unless_gone(request, answering(service, body, request.state.take_tiles, metrics), metrics)

    app.router.add_api_route(
        CHAT_PATH, chat_completions, methods=["POST"], response_model=ChatCompletion, responses=STREAMED,
        route_class_override=ChatRoute,
    )  # fmt: skip


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
