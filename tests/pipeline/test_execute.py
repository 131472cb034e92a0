"""The pools of a run grow under load and shrink without it, and no block is lost on the way."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import ray

from pipeline.execute import _data_context, _pool

MOST = 3
BLOCKS = 300


class Source:
    """Passes blocks on: at once, but for the time in which all workers are there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, block: pa.Table) -> pa.Table:
        if len(alive(self._folder)) == MOST:
            time.sleep(0.1)
        return block


class Worker:
    """Takes three seconds a block until all workers have come, and no time afterwards. A file names its process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / str(os.getpid())).touch()

    def __call__(self, block: pa.Table) -> pa.Table:
        if len(list(self._folder.iterdir())) < MOST:
            time.sleep(3.0)
        return block


def alive(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if Path("/proc", path.name).exists()]


@pytest.mark.timeout(250)
def test_a_pool_grows_with_the_load_and_shrinks_without_it(ray_cluster: str, tmp_path: Path) -> None:
    with _data_context():
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
        seen = [(block, len(alive(tmp_path))) for block in blocks(dataset)]
    assert sorted(block for block, _ in seen) == list(range(BLOCKS))
    counts = [count for _, count in seen]
    assert counts[0] == 1
    assert max(counts) == MOST
    # Well before the end, when Ray Data takes all workers away because nothing is left to do.
    assert min(counts[counts.index(MOST) : -20]) < MOST


def blocks(dataset: ray.data.Dataset) -> Iterator[int]:
    """Yield the blocks' numbers as they come."""
    for batch in dataset.iter_batches(batch_size=1, batch_format="numpy", prefetch_batches=0):
        yield int(batch["id"][0])
