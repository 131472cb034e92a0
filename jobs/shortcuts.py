"""Jobs without a job file: one task on one source, and command-line options laid over a job file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_MODEL = "HuggingFaceTB/SmolVLM-256M-Instruct"
DEFAULT_REVISION = "7e3e67edbbed1bf9888184d9df282b700a323964"

_NVIDIA_DRIVER = Path("/dev/nvidiactl")

CAPTION = {"name": "caption", "prompt": "Describe this image.", "max_new_tokens": 128}
OCR = {"name": "ocr", "prompt": "Transcribe all text.", "max_new_tokens": 1024}


@dataclass(frozen=True)
class Options:
    """Command-line options that replace what a job file says; None leaves it as it is."""

    limit: int | None = None
    model: str | None = None
    revision: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    endpoint_url: str | None = None
    gpus: float | None = None
    replicas: tuple[int, int] | None = None


def one_task(task: Mapping[str, Any], source: str, output: str) -> dict[str, Any]:
    """Return the content of a job file that asks `task` of every image of `source`."""
    return {
        "name": task["name"],
        "source": {"uri": source},
        "output": {"uri": output},
        "model": {"id": DEFAULT_MODEL, "revision": DEFAULT_REVISION},
        "tasks": [dict(task)],
        "engine": {"gpus": 1 if has_gpu() else 0},
    }


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA driver."""
    return _NVIDIA_DRIVER.exists()


def with_options(content: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """Return `content` with `options` laid over it. What is not a mapping is left for validation to refuse."""
    merged = dict(content)
    if options.limit is not None:
        merged["limit"] = options.limit
    if options.model is not None:
        # A revision belongs to one model: the old one must not stay behind for the new.
        merged["model"] = _without(merged.get("model"), "revision") | {"id": options.model}
    numbers = {"dtype": options.dtype, "quantization": options.quantization}
    _lay_over(merged, "model", {"revision": options.revision, **numbers})
    replicas = None if options.replicas is None else list(options.replicas)
    _lay_over(merged, "engine", {"gpus": options.gpus, "replicas": replicas})
    for side in ("source", "output"):
        if _is_s3(merged.get(side)):
            _lay_over(merged, side, {"endpoint_url": options.endpoint_url})
    return merged


def _lay_over(merged: dict[str, Any], key: str, values: Mapping[str, Any]) -> None:
    given = {name: value for name, value in values.items() if value is not None}
    if given and isinstance(merged.get(key, {}), Mapping):
        merged[key] = {**merged.get(key, {}), **given}


def _without(content: Any, key: str) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name != key} if isinstance(content, Mapping) else {}


def _is_s3(content: Any) -> bool:
    return isinstance(content, Mapping) and str(content.get("uri", "")).startswith("s3://")
