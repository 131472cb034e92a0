"""How a job fits a cluster: sizes of pools and blocks, and a plain refusal if the smallest form of it does not fit."""

import math
from dataclasses import dataclass

import ray

from pipeline.errors import ConfigError
from pipeline.job import Job
from smolvlm.config import ImageConfig

READ_CPUS = 0.1
WRITE_CPUS = 0.1
_REPARTITION_CPUS = 1.0  # Ray's own figure for cutting blocks to size; it does not let one choose
_PASSING_CPUS = READ_CPUS + WRITE_CPUS + _REPARTITION_CPUS
_HANDING_CPUS = 0.1  # an actor that hands rows to an endpoint and waits
_BLOCK_BYTES = 48 << 20
_MAX_ROWS_PER_BLOCK = 256
_MAX_BLOCKS_PER_ENGINE = 64  # each is a thread that waits
_BLOCKS_PER_RUN = 32


@dataclass(frozen=True)
class Resources:
    """The sizes that `execute` uses."""

    image_config: ImageConfig
    max_rows_per_block: int
    num_read_tasks: int
    prepare_workers: tuple[int, int]
    prepare_cpus: float
    engine_cpus: float
    engine_gpus: float
    engine_sequences: int

    def rows_per_block(self, rows: int) -> int:
        """Return the block size for a run of `rows`: a small run is cut small, so that every worker gets some."""
        return max(1, min(self.max_rows_per_block, rows // _BLOCKS_PER_RUN))

    def blocks_per_engine(self, rows: int) -> int:
        """Return how many blocks to send an engine at once: a batch to work on and the next one waiting."""
        return min(max(2, -(-2 * self.engine_sequences // self.rows_per_block(rows))), _MAX_BLOCKS_PER_ENGINE)


def plan_resources(job: Job, image_config: ImageConfig, endpoint_sequences: int | None = None) -> Resources:
    """Return the sizes for the running cluster. Raises ConfigError naming what is asked and what is there.

    `endpoint_sequences` is how many sequences the engines of the endpoint decode together that this job shares; None
    for a job with engines of its own.
    """
    is_shared = endpoint_sequences is not None
    # Beside an endpoint there is only what it leaves.
    available: dict[str, float] = ray.available_resources() if is_shared else ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus, gpus = available.get("CPU", 0.0), available.get("GPU", 0.0)
    engine_gpus = 0.0 if is_shared else job.engine.gpus
    engine_cpus = job.engine.cpus or _engine_cpus(job, cpus, is_shared)
    prepare_cpus = 1.0 if cpus >= 4 else 0.25
    spare = cpus - _PASSING_CPUS - engine_cpus * job.engine.replicas[0]
    most = max(1, int(spare / prepare_cpus))
    prepare_workers = job.engine.prepare_workers or (1, most)
    _check_fits(job, engine_cpus, engine_gpus, prepare_workers[0] * prepare_cpus, cpus, gpus)
    return Resources(
        image_config=image_config,
        max_rows_per_block=_max_rows_per_block(job, image_config),
        num_read_tasks=max(1, int(cpus)),
        prepare_workers=prepare_workers,
        prepare_cpus=prepare_cpus,
        engine_cpus=engine_cpus,
        engine_gpus=engine_gpus,
        engine_sequences=_sequences(job, endpoint_sequences),
    )


def _engine_cpus(job: Job, cpus: float, is_shared: bool) -> float:
    if is_shared:
        return _HANDING_CPUS
    return 1.0 if job.engine.gpus else max(0.5, (cpus - _PASSING_CPUS) / 2 / job.engine.replicas[0])


def _sequences(job: Job, endpoint_sequences: int | None) -> int:
    """What an engine decodes together, or an actor's part of what the endpoint's engines do."""
    if endpoint_sequences is not None:
        return -(-endpoint_sequences // job.engine.replicas[0])
    return job.engine.max_num_sequences or (256 if job.engine.gpus else 16)


def _check_fits(
    job: Job, engine_cpus: float, engine_gpus: float, prepare_cpus: float, cpus: float, gpus: float
) -> None:
    replicas = job.engine.replicas[0]
    needed = replicas * engine_cpus + prepare_cpus + _PASSING_CPUS
    if engine_gpus * replicas > gpus:
        raise ConfigError(
            f"engine.gpus = {job.engine.gpus:g} for {replicas} replicas, but the cluster has {gpus:g} GPUs. "
            "Lower engine.replicas, set engine.gpus to 0, or add nodes."
        )
    if needed > cpus + 1e-6:
        raise ConfigError(
            f"the smallest form of this job needs {needed:g} CPUs ({replicas} engine replicas of {engine_cpus:g}, "
            f"prepare {prepare_cpus:g}, read and write {_PASSING_CPUS:g}), but the cluster has {cpus:g}. "
            "Lower engine.replicas or engine.cpus, or add nodes."
        )


def _max_rows_per_block(job: Job, config: ImageConfig) -> int:
    """As many rows as keep a block of the largest possible images near _BLOCK_BYTES."""
    splitting = config.do_image_splitting if job.image.splitting is None else job.image.splitting
    side = math.ceil((job.image.longest_edge or config.longest_edge) / config.tile_size) if splitting else 1
    tiles = side * side + 1 if side > 1 else 1
    return max(1, min(_MAX_ROWS_PER_BLOCK, _BLOCK_BYTES // (tiles * 3 * config.tile_size**2)))
