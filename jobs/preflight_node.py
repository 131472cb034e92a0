"""What preflight looks at on one node of a cluster; an actor there holds an `Inspector`."""

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from uuid import uuid4

from pipeline.engine_worker import make_engine
from pipeline.job import EngineOptions, Model, Output, Source
from pipeline.source import input_batches
from pipeline.storage import Location

PACKAGES = ("ray", "torch", "transformers", "pyarrow", "smolvlm-pipeline")
_GPUS = Path("/proc/driver/nvidia/gpus")
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Facts:
    """One node: versions of what a job needs there, bytes of shared memory, GPUs that the driver knows."""

    versions: dict[str, str]
    shared_memory_bytes: int
    gpus: int


def facts() -> Facts:
    """Return those of this machine."""
    shared = os.statvfs(_SHARED_MEMORY) if _SHARED_MEMORY.exists() else None
    return Facts(
        versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        shared_memory_bytes=0 if shared is None else shared.f_frsize * shared.f_blocks,
        gpus=len(list(_GPUS.iterdir())) if _GPUS.exists() else 0,
    )


class Inspector:
    """Answers for the node that it runs on. What it cannot do it raises, with the reason."""

    def facts(self) -> Facts:
        """Return what there is."""
        return facts()

    def now(self) -> float:
        """Return this node's clock, seconds since 1970."""
        return time.time()

    def missing(self, names: Sequence[str]) -> list[str]:
        """Return which of these environment variables are not set here. No value leaves the node."""
        return [name for name in names if not os.environ.get(name)]

    def first_object(self, source: Source) -> str | None:
        """Return the URI of the first object of the source."""
        batch = next(input_batches(source, Location(source.uri, source.endpoint_url)), None)
        return None if batch is None else batch.objects[0].uri

    def read(self, location: Location) -> int:
        """Read the beginning of an object and return the number of bytes."""
        return len(location.read(0, 1 << 16))

    def try_destination(self, output: Output) -> str | None:
        """Write, write again, replace and delete an object; return what is wrong with the store's answers."""
        place = Location(output.uri, output.endpoint_url).child(f"_preflight-{uuid4().hex}")
        try:
            if not place.put_if_absent(b"first"):
                return "a new object was taken for an old one"
            if place.put_if_absent(b"second") or place.read() != b"first":
                return "put-if-absent overwrote an object that was there"
            if place.replace(b"third", etag="0" * 32) or place.read() != b"first":
                return "a replacement of another version went through"
        finally:
            place.delete()
        return None

    def make_engine(self, model: Model, options: EngineOptions) -> float:
        """Make the engine of a run, with weights, 8-bit numbers and cache, and return the seconds it took."""
        started = time.monotonic()
        make_engine(model, options)
        return time.monotonic() - started


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
