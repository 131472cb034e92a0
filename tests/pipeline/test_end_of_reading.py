"""A drain in a real graph: what workers have begun comes out, the rest is not even cut into blocks."""

import time
from typing import Any

import pytest
import ray
from ray.data._internal.execution import streaming_executor
from ray.data._internal.execution.metadata_fetcher import ThreadedMetadataFetcher

from pipeline.control import Control
from pipeline.execute import _data_context, _pool

BLOCKS = 2000


class Worker:
    """Counts its blocks on the board, and asks for a drain at the tenth."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._blocks = 0

    def __call__(self, block: Any) -> Any:
        self._blocks += 1
        self._control.add(None, blocks=1)
        if self._blocks == 10:
            self._control.drain()
        return block


def fetch_slowly(refs: Any, timeout: float | None = None) -> Any:
    time.sleep(0.3)
    return ray.get(refs, timeout=timeout)


def rows_until_drained(control: Control, read_tasks: int) -> list[int]:
    with _data_context(control):
        worked = (
            ray.data.range(BLOCKS, override_num_blocks=read_tasks)
            .repartition(target_num_rows_per_block=1)
            .map_batches(
                Worker, fn_constructor_args=(control,), compute=_pool((1, 1), 1), num_cpus=0.25, batch_size=None
            )
        )
        return [row["id"] for row in worked.iter_rows()]


@pytest.mark.parametrize("read_tasks", [2, 500])
def test_a_drain_ends_the_reading(ray_cluster: str, monkeypatch: pytest.MonkeyPatch, read_tasks: int) -> None:
    """With many short tasks and slow descriptions of blocks, some tasks' ends are on their way when the drain comes."""
    fetcher = ThreadedMetadataFetcher(get_objects=fetch_slowly)
    monkeypatch.setattr(streaming_executor, "make_metadata_fetcher", lambda: fetcher)
    control = Control.create()
    rows = rows_until_drained(control, read_tasks)
    assert len(set(rows)) == len(rows) == control.counts()["blocks"]
    assert 10 <= len(rows) < BLOCKS / 2


def test_a_drain_before_the_first_block_leaves_nothing(ray_cluster: str) -> None:
    control = Control.create()
    control.drain()
    assert rows_until_drained(control, read_tasks=2) == []
    assert "blocks" not in control.counts()
