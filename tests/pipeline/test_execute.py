"""The pools of a run grow under load and shrink without it, and no block is lost on the way."""

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import ray
from waiting import wait_for

from pipeline.control import Control
from pipeline.execute import _data_context, _pool

MOST = 3
BLOCKS = 300
UNTIL_GROWN = 60  # blocks; more than all workers hold


class Source:
    """Passes on what makes the pool behind it grow, and the rest once that pool has grown and shrunk again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, block: pa.Table) -> pa.Table:
        if block["id"][0].as_py() >= UNTIL_GROWN:
            wait_for(lambda: have_come(self._folder) >= MOST > alive(self._folder), 300)
        return block


class Worker:
    """Gives no block back until all workers have come. A file names its process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / str(os.getpid())).touch()

    def __call__(self, block: pa.Table) -> pa.Table:
        wait_for(lambda: have_come(self._folder) >= MOST, 300)
        return block


def have_come(folder: Path) -> int:
    return len(list(folder.iterdir()))


def alive(folder: Path) -> int:
    return sum(Path("/proc", path.name).exists() for path in folder.iterdir())


def test_a_pool_starts_with_its_smallest_size() -> None:
    pool = _pool((2, 5), 1)
    assert (pool.min_size, pool.initial_size, pool.max_size) == (2, 2, 5)


@pytest.mark.timeout(700)
def test_a_pool_grows_with_the_load_and_shrinks_without_it(ray_cluster: str, tmp_path: Path) -> None:
    """The blocks come to an end only if the pool grows to its largest size and shrinks, however slow the machine is."""
    with _data_context(Control.create()):
        dataset = (
            ray.data.from_arrow([pa.table({"id": [number]}) for number in range(BLOCKS)])
            .map_batches(
                Source,
                fn_constructor_args=(tmp_path,),
                compute=_pool((1, 1), 1),
                num_cpus=0.1,
                batch_size=None,
                batch_format="pyarrow",
            )
            .map_batches(
                Worker,
                fn_constructor_args=(tmp_path,),
                compute=_pool((1, MOST), 2),
                num_cpus=0.1,
                batch_size=None,
                batch_format="pyarrow",
            )
        )
        assert sorted(blocks(dataset)) == list(range(BLOCKS))
    assert have_come(tmp_path) >= MOST


def blocks(dataset: ray.data.Dataset) -> Iterator[int]:
    """Yield the blocks' numbers as they come."""
    for batch in dataset.iter_batches(batch_size=1, batch_format="numpy", prefetch_batches=0):
        yield int(batch["id"][0])
