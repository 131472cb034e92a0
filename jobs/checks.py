"""What types alone cannot say about a job: names, URLs, secrets, ranges that belong together."""

import re
from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import fsspec
from pydantic_core import PydanticCustomError

from jobs.explain import holds_secret
from pipeline.job import EngineOptions, Limits, Model, Output, Source, Task
from pipeline.records import FIXED_COLUMNS
from smolvlm.hub import BUNDLED, COMMIT, HUB_ID

SCHEMES = ("s3", "gs", "hf", "az", "abfs", "http", "https", "file", "memory")
_READ_ONLY = ("http", "https")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_JOB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


def refuse(key: str, value: object, remedy: str) -> NoReturn:
    """Raise the error that pydantic puts at the checked field; `key` is the path below that field, may be empty."""
    raise PydanticCustomError("job", "{remedy}", {"key": key, "value": value, "remedy": remedy})


def job_name(name: str) -> str:
    """Return `name` if it can stand in file and cluster names."""
    if not _JOB_NAME.fullmatch(name):
        refuse("", name, "use 1 to 100 letters, digits, `-`, `_` or `.`, starting with a letter or digit")
    return name


def source(value: Source) -> Source:
    """Return `value` if its URL can be read and its options fit its format."""
    _check_url("uri", value.uri)
    _check_endpoint(value.uri, value.endpoint_url)
    if value.column is not None and value.format in ("images", "webdataset"):
        refuse(
            "column",
            value.column,
            f"format `{value.format}` has no columns; leave it out or use format parquet or list",
        )
    if value.glob is not None and not value.glob.strip():
        refuse("glob", value.glob, "leave it out to take every object, or write a pattern such as **/*.jpg")
    return replace(value, uri=_absolute(value.uri))


def output(value: Output) -> Output:
    """Return `value` if its URL can be written to."""
    _check_url("uri", value.uri)
    if _scheme(value.uri) in _READ_ONLY:
        refuse("uri", value.uri, "http is for reading only; write to s3://, gs:// or a local folder")
    _check_endpoint(value.uri, value.endpoint_url)
    return replace(value, uri=_absolute(value.uri))


def model(value: Model) -> Model:
    """Return `value` if it is `bundled`, a directory that exists, or a hub id with a pinned revision."""
    if value.quantization is not None and value.dtype == "float16":
        refuse("dtype", value.dtype, f"quantization {value.quantization} goes with float32 or bfloat16")
    if value.id == BUNDLED:
        _check_unpinned(value)
    elif Path(value.id).expanduser().is_dir():
        _check_checkpoint_directory(value)
        return replace(value, id=_absolute(value.id))
    elif not HUB_ID.fullmatch(value.id):
        refuse(
            "id", value.id, "no such directory; give a checkpoint directory, a hub id such as owner/model, or `bundled`"
        )
    elif not COMMIT.fullmatch(value.revision or ""):
        remedy = "a hub model is pinned: give the full commit id, 40 hex digits, from the model page's history"
        refuse("revision", value.revision, remedy)
    return value


def tasks(values: tuple[Task, ...]) -> tuple[Task, ...]:
    """Return `values` if every name can be a column of its own."""
    seen: set[str] = set()
    for index, task in enumerate(values):
        _check_task_name(f"[{index}].name", task.name, seen)
        seen.add(task.name.lower())
        if not task.prompt.strip():
            refuse(f"[{index}].prompt", task.prompt, "a task asks something: write the prompt")
    return values


def engine(value: EngineOptions) -> EngineOptions:
    """Return `value` if its pools are ranges and its GPU share is one that Ray can place."""
    _check_range("replicas", value.replicas)
    if value.prepare_workers is not None:
        _check_range("prepare_workers", value.prepare_workers)
    if value.gpus > 1 and value.gpus != int(value.gpus):
        refuse("gpus", value.gpus, "use a whole number of GPUs, or a share of one between 0 and 1")
    return value


def place(model: Model, engine: EngineOptions) -> None:
    """Refuse a model that the engine's device cannot run."""
    if model.quantization == "int8" and engine.gpus:
        refuse(
            "model.quantization", model.quantization, "8-bit integers are for CPUs; leave it out or set engine.gpus 0"
        )
    if model.quantization == "fp8" and engine.gpus and model.dtype == "float32":
        refuse("model.dtype", model.dtype, "quantization fp8 goes with bfloat16 on a GPU; write that, or leave it out")


def limits(value: Limits) -> Limits:
    """Return `value` if its time is one moment everywhere and its cost can be counted."""
    if value.finish_by is not None and _moment(value.finish_by) is None:
        remedy = "write date, time and zone in quotes or not, such as 2026-11-25T18:00:00+01:00 or 2026-11-25T17:00:00Z"
        refuse("finish_by", value.finish_by, remedy)
    if value.max_cost is not None and value.price_per_hour is None:
        refuse("price_per_hour", None, "max_cost needs it: what one engine replica costs an hour, in the same currency")
    if value.price_per_hour is not None and value.max_cost is None:
        refuse("max_cost", None, "price_per_hour serves nothing else; add it, or leave both out")
    return value


def own_engine(value: EngineOptions) -> EngineOptions:
    """Return `value` if it fits an endpoint, which has engines of its own and no preparation of its own."""
    if value.mode != "dedicated":
        refuse("mode", value.mode, "an endpoint has its own engines; leave it out")
    if value.prepare_workers is not None:
        refuse("prepare_workers", value.prepare_workers, "an endpoint has `decoders` instead; leave it out")
    return engine(value)


def _check_url(key: str, uri: str) -> None:
    if not uri.strip():
        refuse(key, uri, f"empty; give a URL such as {SCHEMES[0]}://bucket/folder/ or a local path")
    _check_no_secret(key, uri)
    scheme = _scheme(uri)
    if scheme is None:
        return
    if scheme not in SCHEMES or not uri.startswith(f"{scheme}://"):
        known = _list(f"{each}://" for each in SCHEMES)
        refuse(key, uri, f"not a URL this can open; {_nearest(scheme)}use one of {known} or a local path")
    if not uri.removeprefix(f"{scheme}://").strip("/"):
        refuse(key, uri, "nothing follows the scheme; add the bucket or folder")
    _check_installed(key, uri, scheme)


def _check_installed(key: str, uri: str, scheme: str) -> None:
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        refuse(key, uri, f"{scheme}:// needs a package that is not installed: {error}")


def _check_endpoint(uri: str, endpoint_url: str | None) -> None:
    if endpoint_url is None:
        return
    _check_no_secret("endpoint_url", endpoint_url)
    if _scheme(uri) != "s3":
        refuse("endpoint_url", endpoint_url, "an endpoint goes with an s3:// URL only; leave it out")
    parts = urlsplit(endpoint_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        refuse("endpoint_url", endpoint_url, "write http(s)://host[:port]")


def _absolute(uri: str) -> str:
    """A local path must mean the same in every worker, whatever its working directory."""
    return uri if _scheme(uri) else str(Path(uri).expanduser().absolute())


def _check_no_secret(key: str, text: str) -> None:
    if holds_secret(text):
        refuse(
            key,
            "<hidden>",
            "holds a key, password or token; take it out and set it in the environment (AWS_ACCESS_KEY_ID, …)",
        )


def _check_unpinned(value: Model) -> None:
    if value.revision is not None:
        refuse("revision", value.revision, f"model `{value.id}` has no revisions; leave it out")


def _check_checkpoint_directory(value: Model) -> None:
    _check_unpinned(value)
    if not (Path(value.id).expanduser() / "config.json").is_file():
        refuse("id", value.id, "the directory holds no config.json; give the directory of a checkpoint")


def _check_task_name(key: str, name: str, seen: set[str]) -> None:
    if not _NAME.fullmatch(name):
        refuse(key, name, "it becomes a column: use letters, digits and `_`, starting with a letter, 64 at most")
    if name.lower() in FIXED_COLUMNS:
        refuse(key, name, f"every output has a column of that name ({_list(sorted(FIXED_COLUMNS))}); choose another")
    if name.lower() in seen:
        refuse(key, name, "two tasks would fill one column (upper and lower case count as the same); rename one")


def _check_range(key: str, bounds: tuple[int, int]) -> None:
    if bounds[0] > bounds[1]:
        refuse(key, list(bounds), f"the smallest number comes first: write [{bounds[1]}, {bounds[0]}]")


def _moment(text: str) -> datetime | None:
    """The moment that `text` names; None if it is not one, or another in every time zone."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment.tzinfo else None


def _scheme(uri: str) -> str | None:
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", uri)
    return match[1] if match else None


def _nearest(scheme: str) -> str:
    close = get_close_matches(scheme.lower(), SCHEMES, n=1, cutoff=0.5)
    return f"did you mean {close[0]}://? " if close else ""


def _list(words: Iterable[str]) -> str:
    return ", ".join(words)
