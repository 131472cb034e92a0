"""How a job fits a cluster: sizes of pools and blocks, and a plain refusal if the smallest form of it does not fit and
no autoscaler can make it fit.
"""

import math
import time
from dataclasses import dataclass

import ray

from pipeline.autoscaling import Bundle, can_bring, is_autoscaled
from pipeline.errors import ConfigError
from pipeline.job import Job
from smolvlm.config import ImageConfig

READ_CPUS = 0.1
WRITE_CPUS = 0.1
_REPARTITION_CPUS = 1.0  # Ray's own figure for cutting blocks to size; it does not let one choose
_PASSING_CPUS = READ_CPUS + WRITE_CPUS + _REPARTITION_CPUS
_HANDING_CPUS = 0.1  # an actor that hands rows to an endpoint and waits
_PREPARERS_PER_ENGINE = 32  # published runs of Ray Data keep gaining up to 32 CPU cores a GPU
_BLOCK_BYTES = 48 << 20
_MAX_ROWS_PER_BLOCK = 256
_MAX_BLOCKS_PER_ENGINE = 64  # each is a thread that waits
_LEAST_BLOCKS_PER_ENGINE = 32
_RELEASED_WITHIN_S = 5.0  # what a job that has just ended held may count as taken for so long


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
    max_engines: int
    awaited: str = ""
    """What the run has to wait for before its first row, for a person; empty if nothing."""

    def rows_per_block(self, rows: int) -> int:
        """Return the block size for a run of `rows`: a small run is cut small, so that all engines end together."""
        return max(1, min(self.max_rows_per_block, rows // (_LEAST_BLOCKS_PER_ENGINE * self.max_engines)))

    def blocks_per_engine(self, rows: int) -> int:
        """Return how many blocks to send an engine at once: a batch to work on and the next one waiting."""
        return min(max(2, -(-2 * self.engine_sequences // self.rows_per_block(rows))), _MAX_BLOCKS_PER_ENGINE)


@dataclass(frozen=True)
class _Cluster:
    """What there is: (CPUs, GPUs) of every node, and whether an autoscaler may add some."""

    nodes: tuple[tuple[float, float], ...]
    grows: bool

    @property
    def cpus(self) -> float:
        return sum(cpus for cpus, _ in self.nodes)

    @property
    def gpus(self) -> float:
        return sum(gpus for _, gpus in self.nodes)

    @classmethod
    def present(cls, is_shared: bool) -> "_Cluster":
        if is_shared:  # beside an endpoint there is only what it leaves
            found = [ray.available_resources()]  # type: ignore[no-untyped-call]
        else:
            found = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        nodes = tuple((each.get("CPU", 0.0), each.get("GPU", 0.0)) for each in found)
        return cls(nodes, grows=not is_shared and is_autoscaled())


@dataclass(frozen=True)
class _Smallest:
    """The least that a job can run with: `replicas` engines of a size, prepare actors, and one task of each kind that
    passes blocks on."""

    replicas: int
    engine_cpus: float
    engine_gpus: float
    preparers: int
    prepare_cpus: float

    @property
    def cpus(self) -> float:
        return self.replicas * self.engine_cpus + self.preparers * self.prepare_cpus + _PASSING_CPUS

    @property
    def gpus(self) -> float:
        return self.replicas * self.engine_gpus

    def bundles(self) -> list[Bundle]:
        """Return what has to be on one node each, the hardest to place first."""
        engines = [(self.engine_gpus, self.engine_cpus)] * self.replicas
        others = [self.prepare_cpus] * self.preparers + [_REPARTITION_CPUS, READ_CPUS, WRITE_CPUS]
        sizes = sorted([*engines, *((0.0, cpus) for cpus in others)], reverse=True)
        return [{"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus} for gpus, cpus in sizes]


def plan_resources(job: Job, image_config: ImageConfig, endpoint_sequences: int | None = None) -> Resources:
    """Return the sizes for the running cluster. Raises ConfigError naming what is asked and what is there.

    `endpoint_sequences` is how many sequences the engines of the endpoint decode together that this job shares; None
    for a job with engines of its own.
    """
    deadline = time.monotonic() + (0.0 if endpoint_sequences is None else _RELEASED_WITHIN_S)
    while True:
        try:
            return _sizes(job, image_config, endpoint_sequences)
        except ConfigError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.25)


def _sizes(job: Job, image_config: ImageConfig, endpoint_sequences: int | None) -> Resources:
    is_shared = endpoint_sequences is not None
    cluster = _Cluster.present(is_shared)
    engine_gpus = 0.0 if is_shared else job.engine.gpus
    engine_cpus = job.engine.cpus or _engine_cpus(job, cluster, is_shared)
    prepare_cpus = 1.0 if cluster.cpus >= 4 or cluster.grows else 0.25
    engines = _engines_there(job, cluster, engine_gpus)
    sequences = _sequences(job, endpoint_sequences)
    spare = int((cluster.cpus - _PASSING_CPUS - engine_cpus * engines) / prepare_cpus)
    to_come = _PREPARERS_PER_ENGINE * job.engine.replicas[1] if cluster.grows else 1
    prepare_workers = job.engine.prepare_workers or (1, max(spare, to_come))
    smallest = _Smallest(job.engine.replicas[0], engine_cpus, engine_gpus, prepare_workers[0], prepare_cpus)
    return Resources(
        image_config=image_config,
        max_rows_per_block=_max_rows_per_block(job, image_config, sequences),
        num_read_tasks=max(1, int(cluster.cpus)),
        prepare_workers=prepare_workers,
        prepare_cpus=prepare_cpus,
        engine_cpus=engine_cpus,
        engine_gpus=engine_gpus,
        engine_sequences=sequences,
        max_engines=job.engine.replicas[1],
        awaited=_awaited(cluster, smallest),
    )


def _engine_cpus(job: Job, cluster: _Cluster, is_shared: bool) -> float:
    if is_shared:
        return _HANDING_CPUS
    if job.engine.gpus:
        return 1.0
    half_a_node = max((cpus for cpus, _ in cluster.nodes), default=0.0) / 2
    return max(0.5, min((cluster.cpus - _PASSING_CPUS) / 2 / job.engine.replicas[0], half_a_node))


def _engines_there(job: Job, cluster: _Cluster, engine_gpus: float) -> int:
    """How many engines the CPUs are shared with: as many as the GPUs let grow, else the fewest."""
    smallest, largest = job.engine.replicas
    return max(smallest, min(largest, int(cluster.gpus / engine_gpus))) if engine_gpus else smallest


def _sequences(job: Job, endpoint_sequences: int | None) -> int:
    """What an engine decodes together, or an actor's part of what the endpoint's engines do."""
    if endpoint_sequences is not None:
        return -(-endpoint_sequences // job.engine.replicas[0])
    return job.engine.max_num_sequences or (256 if job.engine.gpus else 16)


def _awaited(cluster: _Cluster, smallest: _Smallest) -> str:
    """Say what has to come first. Raises ConfigError if it cannot."""
    bundles = smallest.bundles()
    if _fits(bundles, cluster):
        return ""
    there = f"{cluster.gpus:g} GPUs and {cluster.cpus:g} CPUs"
    if cluster.grows and can_bring(bundles):
        return (
            f"waiting for nodes: the job needs {smallest.gpus:g} GPUs and {smallest.cpus:g} CPUs at least, the cluster "
            f"has {there}, and its autoscaler is adding what is missing"
        )
    raise ConfigError(_refusal(cluster, smallest, there))


def _fits(bundles: list[Bundle], cluster: _Cluster) -> bool:
    """Whether each of `bundles`, hardest first, finds a node; nodes without GPUs are filled first."""
    free = sorted(([gpus, cpus] for cpus, gpus in cluster.nodes))
    for bundle in bundles:
        gpus, cpus = bundle.get("GPU", 0.0), bundle.get("CPU", 0.0)
        place = next((each for each in free if each[0] + 1e-6 >= gpus and each[1] + 1e-6 >= cpus), None)
        if place is None:
            return False
        place[0], place[1] = place[0] - gpus, place[1] - cpus
    return True


def _refusal(cluster: _Cluster, smallest: _Smallest, there: str) -> str:
    replicas, engine_cpus, engine_gpus = smallest.replicas, smallest.engine_cpus, smallest.engine_gpus
    add = "allow its autoscaler more or larger nodes" if cluster.grows else "add nodes"
    if smallest.gpus > cluster.gpus:
        return (
            f"engine.gpus = {engine_gpus:g} for {replicas} replicas, but the cluster has {cluster.gpus:g} GPUs. "
            f"Lower engine.replicas, set engine.gpus to 0, or {add}."
        )
    parts = f"{replicas} engine replicas of {engine_cpus:g}"
    if smallest.cpus > cluster.cpus + 1e-6:
        return (
            f"the smallest form of this job needs {smallest.cpus:g} CPUs ({parts}, prepare "
            f"{smallest.preparers * smallest.prepare_cpus:g}, read and write {_PASSING_CPUS:g}), but the cluster has "
            f"{cluster.cpus:g}. Lower engine.replicas or engine.cpus, or {add}."
        )
    return (
        f"the cluster's {there} lie on nodes that cannot hold the smallest form of this job: {parts} CPUs and "
        f"{engine_gpus:g} GPUs, each on one node, beside {smallest.preparers} prepare workers of "
        f"{smallest.prepare_cpus:g} CPUs. Lower engine.gpus or engine.cpus, or {add}."
    )


def _max_rows_per_block(job: Job, config: ImageConfig, sequences: int) -> int:
    """As many rows as keep a block of the largest possible images near _BLOCK_BYTES, and half a batch at most.

    A block comes out of an engine as a whole: one of many batches would show no progress for minutes, hold an
    interrupted run up for as long, and be lost with its worker.
    """
    splitting = config.do_image_splitting if job.image.splitting is None else job.image.splitting
    side = math.ceil((job.image.longest_edge or config.longest_edge) / config.tile_size) if splitting else 1
    tiles = side * side + 1 if side > 1 else 1
    return max(1, min(_MAX_ROWS_PER_BLOCK, sequences // 2, _BLOCK_BYTES // (tiles * 3 * config.tile_size**2)))
