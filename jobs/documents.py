"""Job files as documents: YAML or JSON text → a mapping, with nothing guessed and no key given twice."""

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import ConfigError

_MAX_BYTES = 1_000_000
_KEEP_AS_TEXT = "tag:yaml.org,2002:timestamp"


class _Repeated(ValueError):
    """A key stands twice in one mapping."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a repeated key and leaves dates as text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise _Repeated(f"line {key_node.start_mark.line + 1}: key `{key}` stands twice; keep one of them")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _KEEP_AS_TEXT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read(path: Path) -> dict[str, Any]:
    """Return the mapping that the file at `path` holds. Raises ConfigError."""
    content = _parse(path, _read_text(path))
    if content is None:
        raise ConfigError(f"{path}: the file is empty; the examples show what belongs into one")
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: the top level is {_kind(content)}; a job file is a mapping of key: value pairs")
    return content


def _read_text(path: Path) -> str:
    if path.suffix not in {".yaml", ".yml", ".json"}:
        raise ConfigError(f"{path}: a job file ends in .yaml, .yml or .json")
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path}: {path.stat().st_size} bytes is too large for a job file; is it the right file?")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; check the path of the job file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None


def _parse(path: Path, text: str) -> Any:
    try:
        return _parse_json(text) if path.suffix == ".json" else yaml.load(text, Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {_where(error)}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except _Repeated as error:
        raise ConfigError(f"{path}: {error}") from None


def _parse_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique_pairs) if text.strip() else None


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise _Repeated(f"key `{key}` stands twice; keep one of them")
    return dict(pairs)


def _where(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or "nested too deeply"
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else str(problem)


def _kind(content: Any) -> str:
    names = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "a truth value"}
    return names.get(type(content), f"a {type(content).__name__}")
