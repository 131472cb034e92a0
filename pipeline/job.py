"""A job as the pipeline sees it: frozen values, already validated by whoever built them.

The job file's reader (`jobs/spec.py`) uses these dataclasses as its field types, so there is one definition of each.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Gt, Interval

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Source:
    """Where the images are."""

    uri: str
    format: Literal["auto", "images", "webdataset", "parquet", "list"] = "auto"
    glob: str | None = None
    """Only objects whose path below `uri` matches, e.g. `**/*.jpg`."""
    column: str | None = None
    """The image column of a Parquet source, or the URI column of a list; found by name and type when left out."""
    endpoint_url: str | None = None
    """S3 endpoint, for stores other than AWS."""


@dataclass(frozen=True)
class Output:
    """Where the rows go."""

    uri: str
    endpoint_url: str | None = None
    rows_per_file: Annotated[int, Gt(0)] | None = None
    """Rows a Parquet file holds, and so what a crash can cost; chosen from the number of inputs when left out."""


@dataclass(frozen=True)
class Model:
    """The checkpoint: a directory, a hub id with a pinned revision, or `bundled`."""

    id: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What engines compute in; `auto` is bfloat16 where their hardware is fast at it, else float32."""
    quantization: Literal["int8", "fp8"] | None = None
    """`int8` rounds the weights of all blocks to 8-bit integers: faster on CPUs without bfloat16 tiles (AMX), slightly
    less exact. It needs a CPU with AVX2 and a C++ compiler where the engine runs. `fp8` rounds weights and inputs of
    the vision encoder's linear layers to 8-bit floats (e4m3), for GPUs of compute capability 8.9 or above in bfloat16;
    a CPU computes the same, slowly."""

    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """`fp8` keeps keys and values as 8-bit floats (e4m3): twice as many tokens in the same memory as in bfloat16, less
    exact. It needs a GPU of compute capability 8.9 or above, or a CPU. `auto` keeps them as they are computed."""


@dataclass(frozen=True)
class Task:
    """A named prompt; its answers become the struct column `name`."""

    name: str
    prompt: str
    max_new_tokens: Annotated[int, Interval(gt=0, le=16384)] = 128
    temperature: Annotated[float, Interval(ge=0, le=5)] = 0.0
    top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0


@dataclass(frozen=True)
class ImageOptions:
    """How images become tiles, and what is refused before decoding."""

    longest_edge: Annotated[int, Interval(gt=0, le=4096)] | None = None
    upscale: bool = True
    splitting: bool | None = None
    fast: bool = False
    """Prepare images sooner, with slightly different pixels in the same grid of tiles: a JPEG is decoded smaller where
    that is enough, and every image is resized once."""
    max_pixels: Annotated[int, Interval(gt=0, le=178_956_970)] = 50_000_000
    """Larger images are refused from their header; the decoding library itself stops at 178,956,970."""
    max_bytes: Annotated[int, Gt(0)] = 100_000_000
    timeout_s: Annotated[float, Gt(0)] = 30.0
    """Seconds one image may take to decode and split before its worker is killed."""


@dataclass(frozen=True)
class EngineOptions:
    """The engine pool and the CPU pool that feeds it."""

    mode: Literal["dedicated", "shared"] = "dedicated"
    """`dedicated`: engines of the job's own. `shared`: those of the endpoint that runs on the same cluster, where
    online requests go first; `gpus`, `threads` and `max_num_sequences` are then the endpoint's own, and `replicas`
    counts the actors that hand it rows."""
    replicas: tuple[Annotated[int, Gt(0)], Annotated[int, Gt(0)]] = (1, 1)
    gpus: Annotated[float, Interval(ge=0)] = 0.0
    cpus: Annotated[float, Gt(0)] | None = None
    """CPUs reserved per replica; left out: one beside a GPU, else the replicas share half of the cluster."""
    threads: Annotated[int, Gt(0)] | None = None
    """Compute threads of a replica without a GPU; all cores of its node, shared by the replicas, when left out."""
    prepare_workers: tuple[Annotated[int, Gt(0)], Annotated[int, Gt(0)]] | None = None
    """Smallest and largest number of prepare actors; sized from the cluster when left out."""
    max_num_sequences: Annotated[int, Gt(0)] | None = None
    """Sequences that decode together; the engine's default when left out."""


@dataclass(frozen=True)
class Limits:
    """Where a job stops cleanly, to go on with higher limits. All runs into one output count together."""

    max_images: Annotated[int, Gt(0)] | None = None
    """Rows that the output may hold."""
    finish_by: str | None = None
    """No image is begun after this time, e.g. 2026-11-25T18:00:00+01:00; those under way are finished."""
    max_cost: Annotated[float, Gt(0)] | None = None
    """No image is begun once this is spent; those under way are finished. Needs price_per_hour."""
    price_per_hour: Annotated[float, Gt(0)] | None = None
    """What one engine replica costs an hour, with its part of all other machines. A run costs this for each of the
    most replicas that it may have, from its start to its end, whether they are up or not."""


@dataclass(frozen=True)
class Job:
    """Everything that decides what is read, asked and written."""

    name: str
    source: Source
    output: Output
    model: Model
    tasks: tuple[Task, ...]
    image: ImageOptions = field(default_factory=ImageOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    limit: Annotated[int, Gt(0)] | None = None
    seed: int = 0
    limits: Limits = field(default_factory=Limits)

    def fingerprint(self) -> dict[str, Any]:
        """Return what must not change between a run and its resume, as flat `key: value` pairs.

        Sizes of pools, files and batches, and limits, are left out: they change how a job runs, never what it writes.
        """
        image, model = asdict(self.image), asdict(self.model)
        # Outputs that were begun before there were these options go on.
        if not self.image.fast:
            del image["fast"]
        if self.model.kv_cache_dtype == "auto":
            del model["kv_cache_dtype"]
        content = {
            "schema_version": SCHEMA_VERSION,
            "source": {
                "uri": self.source.uri,
                "format": self.source.format,
                "glob": self.source.glob,
                "column": self.source.column,
            },
            "model": model,
            "tasks": {task.name: asdict(task) for task in self.tasks},
            "image": {key: value for key, value in image.items() if key != "timeout_s"},
            "limit": self.limit,
            "seed": self.seed,
        }
        return dict(_flatten(content))


def _flatten(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in content.items():
        pairs += _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return pairs
