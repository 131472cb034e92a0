"""Sizes for a cluster: the smallest form always fits, or is refused before anything starts."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline import resources
from pipeline.autoscaling import Bundle
from pipeline.errors import ConfigError
from pipeline.job import EngineOptions, ImageOptions, Job, Model, Output, Source, Task
from pipeline.resources import READ_CPUS, WRITE_CPUS, plan_resources
from smolvlm.config import ImageConfig

REAL = ImageConfig(tile_size=512, longest_edge=2048, do_image_splitting=True, mean=(0.5,) * 3, std=(0.5,) * 3)
PASSING_CPUS = READ_CPUS + WRITE_CPUS + 1.0


def job(image: ImageOptions = ImageOptions(), **engine: Any) -> Job:  # noqa: B008
    tasks = (Task("caption", "Describe."),)
    return Job("x", Source("a"), Output("b"), Model("c"), tasks, image=image, engine=EngineOptions(**engine))


def node(cpus: float, gpus: float = 0, group: str = "") -> dict[str, Any]:
    """Return a node as Ray describes it; with a `group` it is an autoscaler's."""
    found = {"CPU": cpus, "GPU": gpus, "memory": 1e9}
    labels = {"ray.io/node-id": "0"} | ({"ray.io/node-group": group} if group else {})
    return {"Alive": True, "Resources": {name: value for name, value in found.items() if value}, "Labels": labels}


def on_nodes(monkeypatch: pytest.MonkeyPatch, *nodes: dict[str, Any]) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, {"Alive": False, "Resources": {"GPU": 99.0}, "Labels": {}}])


def on_cluster(monkeypatch: pytest.MonkeyPatch, cpus: float, gpus: float = 0) -> None:
    on_nodes(monkeypatch, node(cpus, gpus))


def with_autoscaler(monkeypatch: pytest.MonkeyPatch, answer: bool) -> list[list[Bundle]]:
    """Let the autoscaler answer, and return what it is asked."""
    asked: list[list[Bundle]] = []

    def can_bring(bundles: list[Bundle]) -> bool:
        asked.append(bundles)
        return answer

    monkeypatch.setattr(resources, "can_bring", can_bring)
    return asked


@pytest.mark.parametrize("cpus", [2, 3, 4, 8, 64, 1000])
def test_the_smallest_form_fits_every_cluster_from_two_cpus_on(monkeypatch: pytest.MonkeyPatch, cpus: int) -> None:
    on_cluster(monkeypatch, cpus, gpus=8)
    for replicas, gpus in itertools.product([(1, 1), (1, 4)], [0.0, 1.0]):
        if gpus and cpus < 3:
            continue
        found = plan_resources(job(replicas=replicas, gpus=gpus), REAL)
        smallest, largest = found.prepare_workers
        assert replicas[0] * found.engine_cpus + smallest * found.prepare_cpus + PASSING_CPUS <= cpus + 1e-6
        assert replicas[0] * found.engine_cpus + largest * found.prepare_cpus + PASSING_CPUS <= max(cpus, 2.3)
        assert found.num_read_tasks >= 1


def test_too_small_a_cluster_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cluster(monkeypatch, 1)
    with pytest.raises(ConfigError, match=r"needs [\d.]+ CPUs .* but the cluster has 1\. Lower engine.replicas"):
        plan_resources(job(), REAL)
    on_cluster(monkeypatch, 8)
    with pytest.raises(ConfigError, match=r"6 engine replicas of 2"):
        plan_resources(job(replicas=(6, 6), cpus=2), REAL)


def test_gpus_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cluster(monkeypatch, 64, gpus=1)
    with pytest.raises(
        ConfigError, match=r"engine.gpus = 1 for 2 replicas, but the cluster has 1 GPUs.*set engine.gpus to 0"
    ):
        plan_resources(job(gpus=1, replicas=(2, 8)), REAL)
    assert plan_resources(job(gpus=0.5, replicas=(2, 8)), REAL).engine_cpus == 1.0


def test_gpus_on_nodes_that_are_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    on_nodes(monkeypatch, node(8, 1), node(8, 1), node(8))
    assert plan_resources(job(gpus=1, replicas=(2, 2)), REAL).engine_gpus == 1
    with pytest.raises(
        ConfigError, match=r"24 CPUs lie on nodes that cannot .* 1 engine replicas of 1 CPUs and 2 GPUs"
    ):
        plan_resources(job(gpus=2), REAL)
    with pytest.raises(ConfigError, match=r"lie on nodes that cannot hold .* 1 engine replicas of 10 CPUs and 1 GPUs"):
        plan_resources(job(gpus=1, cpus=10), REAL)


def test_an_engine_without_a_gpu_fits_one_node_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    on_nodes(monkeypatch, *[node(8)] * 16)
    assert plan_resources(job(), REAL).engine_cpus == 4.0


def test_prepare_workers_leave_cpus_to_all_engines_that_the_gpus_let_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cluster(monkeypatch, 32, gpus=4)
    assert plan_resources(job(gpus=1, replicas=(1, 8)), REAL).prepare_workers == (1, 26)
    assert plan_resources(job(gpus=1, replicas=(1, 2)), REAL).prepare_workers == (1, 28)


class TestAutoscaler:
    """A cluster that may grow: what is missing comes, or is refused."""

    def test_what_is_missing_is_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        on_nodes(monkeypatch, node(4, group="head"))
        asked = with_autoscaler(monkeypatch, True)
        found = plan_resources(job(gpus=1, replicas=(2, 4)), REAL)
        engine, block = {"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0}
        assert asked == [[engine, engine, block, block, {"CPU": READ_CPUS}, {"CPU": WRITE_CPUS}]]
        assert found.awaited == (
            "waiting for nodes: the job needs 2 GPUs and 4.2 CPUs at least, the cluster has 0 GPUs and 4 CPUs, "
            "and its autoscaler is adding what is missing"
        )
        assert found.prepare_workers == (1, 4 * 32)

    def test_what_cannot_come_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        on_nodes(monkeypatch, node(4, group="head"))
        with_autoscaler(monkeypatch, False)
        with pytest.raises(
            ConfigError, match=r"the cluster has 0 GPUs\..* or allow its autoscaler more or larger nodes"
        ):
            plan_resources(job(gpus=1), REAL)

    def test_what_is_there_is_not_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        on_nodes(monkeypatch, node(4, group="head"), node(8, 1, group="generate"))
        asked = with_autoscaler(monkeypatch, False)
        assert plan_resources(job(gpus=1, replicas=(1, 8)), REAL).awaited == ""
        assert asked == []

    def test_nobody_is_asked_where_there_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        on_nodes(monkeypatch, node(4))
        asked = with_autoscaler(monkeypatch, True)
        with pytest.raises(ConfigError, match=r"or add nodes\."):
            plan_resources(job(gpus=1), REAL)
        assert asked == []


def test_what_the_job_says_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cluster(monkeypatch, 32)
    found = plan_resources(job(cpus=3.0, prepare_workers=(2, 5)), REAL)
    assert (found.engine_cpus, found.prepare_workers) == (3.0, (2, 5))


@pytest.mark.parametrize(
    ("image", "tiles"),
    [
        (ImageOptions(), 17),
        (ImageOptions(longest_edge=1024), 5),
        (ImageOptions(longest_edge=4096), 65),
        (ImageOptions(splitting=False), 1),
        (ImageOptions(longest_edge=512), 1),
    ],
)
def test_a_block_of_the_largest_images_stays_small(
    monkeypatch: pytest.MonkeyPatch, image: ImageOptions, tiles: int
) -> None:
    on_cluster(monkeypatch, 8)
    found = plan_resources(job(image, max_num_sequences=1024), REAL)
    one = tiles * 3 * 512**2
    assert 1 <= found.max_rows_per_block <= 256
    assert found.max_rows_per_block * one <= max(one, 48 << 20)
    assert (found.max_rows_per_block + 1) * one > 48 << 20


@pytest.mark.parametrize(("sequences", "rows"), [(1, 1), (16, 8), (17, 8), (64, 32), (1024, 64)])
def test_a_block_is_half_a_batch_at_most(monkeypatch: pytest.MonkeyPatch, sequences: int, rows: int) -> None:
    on_cluster(monkeypatch, 8)
    found = plan_resources(job(ImageOptions(splitting=False), max_num_sequences=sequences), REAL)
    assert found.max_rows_per_block == rows


@pytest.mark.parametrize("rows", [1, 31, 1000, 10**9])
def test_small_runs_are_cut_small_and_engines_are_kept_full(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    on_cluster(monkeypatch, 8)
    found = plan_resources(job(ImageOptions(splitting=False)), REAL)
    block = found.rows_per_block(rows)
    assert 1 <= block <= found.max_rows_per_block
    assert block == 1 or rows / block >= 32
    assert 2 <= found.blocks_per_engine(rows) <= 64
    assert found.blocks_per_engine(rows) * block >= 2 * found.engine_sequences


def test_a_real_cluster(ray_cluster: str, tiny_checkpoint: Path) -> None:
    found = plan_resources(job(), ImageConfig.from_pretrained(tiny_checkpoint))
    assert found.num_read_tasks == 2
    assert found.engine_cpus + found.prepare_workers[0] * found.prepare_cpus + PASSING_CPUS <= 2
