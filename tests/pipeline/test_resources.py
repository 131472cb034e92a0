"""Sizes for a cluster: the smallest form always fits, or is refused before anything starts."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.errors import ConfigError
from pipeline.job import EngineOptions, ImageOptions, Job, Model, Output, Source, Task
from pipeline.resources import READ_CPUS, WRITE_CPUS, plan_resources
from smolvlm.config import ImageConfig

REAL = ImageConfig(tile_size=512, longest_edge=2048, do_image_splitting=True, mean=(0.5,) * 3, std=(0.5,) * 3)
PASSING_CPUS = READ_CPUS + WRITE_CPUS + 1.0


def job(image: ImageOptions = ImageOptions(), **engine: Any) -> Job:  # noqa: B008
    tasks = (Task("caption", "Describe."),)
    return Job("x", Source("a"), Output("b"), Model("c"), tasks, image=image, engine=EngineOptions(**engine))


def on_cluster(monkeypatch: pytest.MonkeyPatch, cpus: float, gpus: float = 0) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus, "GPU": gpus, "memory": 1e9})


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
    found = plan_resources(job(image), REAL)
    one = tiles * 3 * 512**2
    assert 1 <= found.max_rows_per_block <= 256
    assert found.max_rows_per_block * one <= max(one, 48 << 20)
    assert (found.max_rows_per_block + 1) * one > 48 << 20


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
