"""`smolvlm preflight`: whether a cluster can run a job, found out in a minute and not after an hour.

An inspector on every node tries what a run will do there. Every failure comes with its remedy.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.preflight_node import Facts, Inspector, facts
from pipeline.autoscaling import can_bring
from pipeline.job import Job
from pipeline.storage import Location

ANSWER_S = 120.0  # a node that does not answer within this is not fit to work
LOAD_S = 600.0  # weights may have to be downloaded first
MAX_SKEW_S = 5.0
MIN_OBJECT_STORE_BYTES = 1 << 30  # twenty blocks of the largest images
_CLOCK_READINGS = 3


@dataclass(frozen=True)
class Check:
    """One thing that was tried: where, whether it went well, what was found and, if not, what to do."""

    name: str
    node: str
    passed: bool
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Node:
    """One node of the cluster and the inspector on it."""

    address: str
    gpus: float
    object_store_bytes: int
    inspector: Any
    engine: Any | None
    """The seconds that making an engine will have taken; None where none can run."""


def preflight(job: Job, secrets: Sequence[str] = ()) -> list[Check]:
    """Check the cluster that this process is connected to. Takes as long as the slowest node makes an engine.

    `secrets` are names of environment variables that every node must have.
    """
    nodes = [_node(each, job) for each in ray.nodes() if each["Alive"]]  # type: ignore[no-untyped-call]
    checks = [_check_gpus(job, nodes)]
    first = _first_object(job, nodes[0])
    checks.append(first)
    here = facts()
    for node in nodes:
        checks += _check_node(job, node, here, secrets, first.found if first.passed else None)
    return checks


def _node(described: dict[str, Any], job: Job) -> Node:
    resources = described["Resources"]
    place = NodeAffinitySchedulingStrategy(described["NodeID"], soft=False)
    actor: Any = ray.remote(Inspector)
    inspector = actor.options(num_cpus=0, scheduling_strategy=place).remote()
    engine, gpus, wanted = None, resources.get("GPU", 0.0), job.engine.gpus
    if job.engine.mode == "dedicated" and gpus >= wanted:
        # An actor of its own: it may need a GPU, and all nodes load at once while other things are looked at.
        maker = actor.options(num_cpus=0, num_gpus=wanted, scheduling_strategy=place).remote()
        engine = maker.make_engine.remote(job.model, job.engine)
    return Node(
        address=f"{described['NodeManagerAddress']}:{described['NodeManagerPort']}",
        gpus=gpus,
        object_store_bytes=int(resources.get("object_store_memory", 0)),
        inspector=inspector,
        engine=engine,
    )


def _check_node(job: Job, node: Node, here: Facts, secrets: Sequence[str], first: str | None) -> Iterator[Check]:
    """Yield the checks of one node; one that does not answer at all fails once."""
    try:
        there: Facts = ray.get(node.inspector.facts.remote(), timeout=ANSWER_S)
    except RayError as error:
        remedy = "see its raylet log; the package must be installed there or travel with the job"
        yield Check("answer", node.address, False, _reason(error), remedy)
        return
    yield check_versions(node.address, here, there)
    yield check_memory(node.address, node.object_store_bytes, there.shared_memory_bytes)
    yield check_node_gpus(node.address, node.gpus, there.gpus)
    yield _check_clock(node)
    yield from _check_secrets(node, secrets)
    if first is not None:
        location = Location(first, job.source.endpoint_url)
        remedy = "give this node the credentials and the way to the store that the first one has"
        yield _tried("source", node.address, lambda: f"{_ask(node.inspector.read, location):,} bytes", remedy)
    yield _check_destination(job, node)
    if node.engine is not None:
        yield _check_engine(node)


def check_versions(address: str, here: Facts, there: Facts) -> Check:
    """Compare a node's versions with the driver's."""
    differing = [
        f"{name} {version}, the driver has {here.versions[name]}"
        for name, version in there.versions.items()
        if version != here.versions[name]
    ]
    found = "; ".join(differing) or f"as the driver's: {', '.join(f'{k} {v}' for k, v in there.versions.items())}"
    return Check("versions", address, not differing, found, "start every node from the same image or environment")


def check_memory(address: str, object_store_bytes: int, shared_memory_bytes: int) -> Check:
    """Tiles go through the object store, which should lie in shared memory."""
    found = f"object store {object_store_bytes / 1e9:.1f} GB, /dev/shm {shared_memory_bytes / 1e9:.1f} GB"
    if object_store_bytes < MIN_OBJECT_STORE_BYTES:
        remedy = f"give it at least {MIN_OBJECT_STORE_BYTES / 1e9:.1f} GB: ray start --object-store-memory"
        return Check("memory", address, False, found, remedy)
    remedy = "make /dev/shm as large as the object store: docker run --shm-size, or an emptyDir with medium Memory"
    return Check("memory", address, shared_memory_bytes >= object_store_bytes, found, remedy)


def check_node_gpus(address: str, in_ray: float, in_driver: int) -> Check:
    """Compare what Ray hands out with what is there."""
    remedy = "start Ray with --num-gpus as many as there are, in a container that sees them (--gpus all)"
    return Check("GPUs", address, in_ray == in_driver, f"{in_ray:g} in Ray, {in_driver} on the machine", remedy)


def _check_gpus(job: Job, nodes: Sequence[Node]) -> Check:
    shared = job.engine.mode == "shared"
    wanted = 0.0 if shared else job.engine.gpus * job.engine.replicas[0]
    found = sum(node.gpus for node in nodes)
    comes = found < wanted and can_bring([{"GPU": job.engine.gpus}] * job.engine.replicas[0])
    told = f"{found:g}, the job needs {wanted:g}" + (": the autoscaler can add them" if comes else "")
    remedy = "add nodes with GPUs, or lower engine.replicas or engine.gpus"
    return Check("GPUs", "cluster", found >= wanted or comes, told, remedy)


def _first_object(job: Job, node: Node) -> Check:
    remedy = "check source.uri, the endpoint, and the credentials in the nodes' environment"

    def find() -> str:
        uri = _ask(node.inspector.first_object, job.source)
        if uri is None:
            raise FileNotFoundError(f"{job.source.uri}: nothing found")
        return str(uri)

    return _tried("listing", node.address, find, remedy)


def _check_clock(node: Node) -> Check:
    skew_s = min((_skew(node) for _ in range(_CLOCK_READINGS)), key=abs)
    found = f"{skew_s:+.2f} s from the driver's"
    return Check(
        "clock", node.address, abs(skew_s) <= MAX_SKEW_S, found, "run a time service (chrony, systemd-timesyncd)"
    )


def _skew(node: Node) -> float:
    """How far the node's clock is off, as far as the answer's own time allows to tell."""
    started = time.time()
    there = _ask(node.inspector.now)
    ended = time.time()
    return float(there - ended if there > ended else there - started if there < started else 0.0)


def _check_secrets(node: Node, names: Sequence[str]) -> Iterator[Check]:
    if names:
        missing = _ask(node.inspector.missing, list(names))
        found = f"not set: {', '.join(missing)}" if missing else f"{', '.join(names)} set"
        remedy = "set it in the node's environment: a Kubernetes secret, an instance role, or before `ray start`"
        yield Check("secrets", node.address, not missing, found, remedy)


def _check_destination(job: Job, node: Node) -> Check:
    remedy = "give the nodes the right to write, read and delete there, and use a store that knows If-None-Match"

    def write() -> str:
        wrong = _ask(node.inspector.try_destination, job.output)
        if wrong is not None:
            raise ValueError(wrong)
        return "conditional writes work"

    return _tried("destination", node.address, write, remedy)


def _check_engine(node: Node) -> Check:
    remedy = (
        "check the job's `model` and HF_TOKEN, that the node reaches the hub or has the directory, that its GPU is free"
    )
    engine: Any = node.engine
    return _tried("engine", node.address, lambda: f"made in {ray.get(engine, timeout=LOAD_S):.1f} s", remedy)


def _tried(name: str, address: str, call: Callable[[], str], remedy: str) -> Check:
    try:
        return Check(name, address, True, call())
    except (RayError, ValueError, OSError) as error:
        return Check(name, address, False, _reason(error), remedy)


def _ask(method: Any, *arguments: Any) -> Any:
    return ray.get(method.remote(*arguments), timeout=ANSWER_S)


def _reason(error: Exception) -> str:
    if isinstance(error, GetTimeoutError):
        return "no answer in time"
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {str(cause).strip().splitlines()[-1]}"
