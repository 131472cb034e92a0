"""Requests made up from the OpenAPI document: good ones, bad ones and borderline ones; none may break the server."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy
from local_gateway import Gateway, data_url
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance, response_schema_conformance

from pipeline.endpoint.options import EndpointOptions

FEW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
CHAT = "/v1/chat/completions"
AnyCase = Case[Any]


@pytest.fixture
def document(gateway: Gateway) -> Any:
    return schemathesis.openapi.from_url(f"{gateway.url}/openapi.json")


def for_each_case(operation: Any, mode: GenerationMode, check: Callable[[AnyCase], None]) -> None:
    cases: SearchStrategy[AnyCase] = operation.as_strategy(generation_mode=mode)
    FEW(given(cases)(check))()


def test_the_document_has_all_routes(document: Any) -> None:
    assert {operation.ok().label for operation in document.get_all_operations()} == {
        f"POST {CHAT}", "GET /v1/models", "GET /v1/models/{model}", "GET /health", "GET /ready", "GET /metrics",
    }  # fmt: skip


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_every_answer_is_one_that_the_document_promises(document: Any, mode: GenerationMode) -> None:
    def check(case: AnyCase) -> None:
        # A well-formed request may still name a model that is not there, or an image that is none.
        case.call_and_validate(excluded_checks=[positive_data_acceptance], timeout=60)

    for operation in document.get_all_operations():
        if mode is GenerationMode.POSITIVE or operation.ok().path == CHAT:  # the others take nothing that can be wrong
            for_each_case(operation.ok(), mode, check)


def test_requests_that_reach_the_engine(document: Any, options: EndpointOptions) -> None:
    """Good ones with the model's own name, a real image where there is one, and short answers."""
    statuses: set[int] = set()

    def check(case: AnyCase) -> None:
        assert isinstance(case.body, dict)
        case.body = reachable(case.body, options.model_name)
        reply = case.call(timeout=60)
        assert reply.status_code in (200, 400), reply.text
        statuses.add(reply.status_code)
        if not case.body.get("stream"):
            case.validate_response(reply, checks=[response_schema_conformance])

    for_each_case(document[CHAT]["POST"], GenerationMode.POSITIVE, check)
    assert 200 in statuses


def reachable(body: dict[str, Any], model: str) -> dict[str, Any]:
    found = copy.deepcopy(body)
    found |= {"model": model, "max_tokens": 2, "max_completion_tokens": None, "stream_options": None}
    for message in found["messages"]:
        parts = message["content"] if isinstance(message["content"], list) else []
        for part in parts:
            if part["type"] == "image_url":
                part["image_url"]["url"] = data_url()
    return found
