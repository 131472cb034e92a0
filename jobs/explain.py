"""Validation errors in words: where, which value, what to do."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

_MAX_VALUE_CHARS = 80
_SECRET = re.compile(
    r"//[^/@]*:[^/@]*@"  # user:password@host
    r"|\b(AKIA|ASIA)[0-9A-Z]{16}\b"  # an AWS key id
    r"|[?&](X-Amz-[A-Za-z-]+|AWSAccessKeyId|Signature|sig|token|secret)=",  # a signed URL
    re.IGNORECASE,
)
_WANTED = {
    "string_type": "must be text; put it in quotes",
    "int_type": "must be a whole number, without quotes",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number, without quotes (write 1.0e-1 or 0.1, not 1e-1)",
    "bool_type": "must be true or false",
    "finite_number": "must be a finite number",
}


def validation_error(error: ValidationError, schema: Mapping[str, Any]) -> list[str]:
    """Return one line per mistake: `path`: value: what to do. The JSON schema tells which keys are allowed where."""
    items = [dict(item) for item in error.errors(include_url=False)]
    # A list whose items are wrong also counts as too short: the items are what is wrong.
    return [_line(item, schema) for item in items if item["type"] != "too_short" or not item["input"]]


def refusal(key: str, error: PydanticCustomError) -> str:
    """Return the line for what `checks.refuse` raised about the value at `key`."""
    return _line({"loc": (key,), "type": error.type, "ctx": error.context}, {})


def holds_secret(text: str) -> bool:
    """Whether `text` carries a credential: user:password@, a cloud key id or a signed URL."""
    return _SECRET.search(text) is not None


def not_json(content: Any) -> str:
    """Say which value of `content` cannot stand in a job file (NaN, binary, a key that is not text, …)."""
    for path, value in _leaves(content, ()):
        if not isinstance(value, str | int | float | bool | None) or (
            isinstance(value, float) and not math.isfinite(value)
        ):
            return (
                f"`{_path(path)}`: {value!r} cannot stand in a job file; use text, a finite number, true, false or null"
            )
    return "holds a key or value that is neither text, number, true, false nor null"


def _line(item: dict[str, Any], schema: Mapping[str, Any]) -> str:
    location, kind, context = item["loc"], item["type"], item.get("ctx", {})
    if kind == "job":
        path = _path((*location, context["key"])) if context["key"] else _path(location)
        return f"`{path}`: {_shown(context['value'])}: {context['remedy']}"
    if kind == "value_error":
        return f"`{_path(location)}`: {context['error']}"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"`{_path(location)}`: unknown key; {_allowed(location, schema)}"
    if kind == "missing":
        return f"`{_path(location)}`: missing; add it{_meaning(location, schema)}"
    return f"`{_path(location)}`: {_shown(item['input'])}: {_problem(kind, item, schema)}"


def _problem(kind: str, item: dict[str, Any], schema: Mapping[str, Any]) -> str:
    if kind in ("dataclass_type", "model_type"):
        return f"must be a mapping of keys ({', '.join(_keys(item['loc'], schema))})"
    if kind in ("tuple_type", "list_type"):
        return "must be a list"
    if kind == "too_long":
        return f"must have at most {item['ctx']['max_length']} items"
    if kind == "literal_error":
        return f"must be one of {item['ctx']['expected']}"
    if kind == "too_short":
        return "must not be empty"
    return _WANTED.get(kind) or item["msg"].replace("Input should", "must").replace("Field required", "missing")


def _allowed(location: Sequence[Any], schema: Mapping[str, Any]) -> str:
    keys = _keys(location[:-1], schema)
    close = get_close_matches(str(location[-1]), keys, n=1, cutoff=0.6)
    hint = f"did you mean `{close[0]}`? " if close else ""
    return f"{hint}allowed here: {', '.join(keys)}"


def _meaning(location: Sequence[Any], schema: Mapping[str, Any]) -> str:
    keys = _keys(location, schema)
    return f" ({', '.join(keys)})" if keys else ""


def _keys(location: Sequence[Any], schema: Mapping[str, Any]) -> list[str]:
    node: Mapping[str, Any] = schema
    for step in location:
        node = _resolve(node, schema)
        node = node.get("properties", {}).get(step, {}) if isinstance(step, str) else node.get("items", {})
    return list(_resolve(node, schema).get("properties", {}))


def _resolve(node: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    options = [option for option in node.get("anyOf", ()) if "$ref" in option]  # what may be left out: it or null
    reference = node.get("$ref") or (options[0]["$ref"] if options else None)
    return schema["$defs"][reference.rpartition("/")[2]] if reference else node


def _path(location: Sequence[Any]) -> str:
    text = ""
    for step in location:
        separated = isinstance(step, str) and text and not step.startswith("[")
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if separated else str(step)
    return text or "top level"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    if holds_secret(text):
        return "<hidden>"
    return text if len(text) <= _MAX_VALUE_CHARS else f"{text[:_MAX_VALUE_CHARS]}…"


def _leaves(content: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _leaves(value, (*path, str(key)))
    elif isinstance(content, list):
        for index, value in enumerate(content):
            yield from _leaves(value, (*path, index))
    else:
        yield path, content
