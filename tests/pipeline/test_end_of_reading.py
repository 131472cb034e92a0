"""A drain in a real graph: what workers have begun comes out, the rest is not even cut into blocks."""

from typing import Any

import ray

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


def test_a_drain_ends_the_reading(ray_cluster: str) -> None:
    control = Control.create()
    with _data_context(control):
        worked = (
            ray.data.range(BLOCKS, override_num_blocks=2)
            .repartition(target_num_rows_per_block=1)
            .map_batches(
                Worker, fn_constructor_args=(control,), compute=_pool((1, 1), 1), num_cpus=0.25, batch_size=None
            )
        )
        rows = [row["id"] for row in worked.iter_rows()]
    assert len(set(rows)) == len(rows) == control.counts()["blocks"]
    assert 10 <= len(rows) < BLOCKS / 2
