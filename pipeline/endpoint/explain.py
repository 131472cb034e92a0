"""Why a request's body was refused, in one sentence that names the field and never repeats the value."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.endpoint.errors import ApiError

MAX_NAME_CHARS = 64


def validation_error(errors: Sequence[Mapping[str, Any]], body: bytes) -> ApiError:
    """Turn pydantic's first error about the JSON of `body` into OpenAI's error object."""
    error = errors[0]
    if error["type"] == "json_invalid" or not error["loc"]:
        return ApiError(400, "invalid_json", "the body must be a JSON object")
    param = _path(error["loc"], json.loads(body), error["type"])
    if error["type"] == "extra_forbidden":
        return ApiError(400, "unknown_parameter", f"unknown parameter {param!r}: leave it out", param)
    if error["type"] == "missing":
        return ApiError(400, "missing_required_parameter", f"missing parameter {param!r}", param)
    return ApiError(400, "invalid_value", f"{param}: {_reason(error)}", param)


def _reason(error: Mapping[str, Any]) -> str:
    if error["type"] == "union_tag_invalid":
        return f"must be one of {error['ctx']['expected_tags']}"
    if error["type"] == "union_tag_not_found":
        return f"needs {error['ctx']['discriminator']}"
    message = str(error["msg"])
    return message[0].lower() + message[1:]


def _path(loc: Sequence[Any], body: Any, error_type: str) -> str:
    """Follow `loc` through the body: pydantic puts names of union members between the keys, which nobody sent.
    Only of a missing key the last step is not there."""
    steps, value = [], body
    for place, step in enumerate(loc, 1):
        known = isinstance(value, Mapping) and step in value
        if known or (isinstance(value, list) and isinstance(step, int) and step < len(value)):
            value = value[step]
        elif error_type != "missing" or place < len(loc):
            continue
        steps.append(str(step)[:MAX_NAME_CHARS])
    return ".".join(steps)
