"""A drain ends the reading of the manifest. Workers that drain give empty blocks back at once, but Ray Data passes on a
few dozen of them a second: what is left of a million images would take hours.
"""

from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.interfaces.physical_operator import DataOpTask, PhysicalOperator
from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from ray.data._internal.stats import Timer

from pipeline.control import Control


class EndOfReading(ExecutionCallback):
    """Once the run drains, ends what comes before the first workers, as Ray Data does itself where a limit is reached;
    the blocks that wait for them are dropped. What the workers have goes on to its commit."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._is_reached = False

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        """Look whether the run drains; Ray Data calls this in the driver, after each step of its loop."""
        if self._is_reached or not self._control.is_draining():
            return
        self._is_reached = True
        for operator, state in (executor._topology or {}).items():
            if isinstance(operator, ActorPoolMapOperator):
                return
            _mute(operator)
            operator.shutdown(Timer())  # type: ignore[no-untyped-call]
            operator.mark_execution_finished()  # type: ignore[no-untyped-call]
            state.output_queue.clear()  # type: ignore[no-untyped-call]


def _mute(operator: PhysicalOperator) -> None:
    """Let no task of the operator report to it any more: the description of a block, and with the last one the task's
    end, may still be on its way when the operator has forgotten its tasks."""
    for task in operator.get_active_tasks():
        if isinstance(task, DataOpTask):
            task._output_ready_callback = lambda _block: None
            task._task_done_callback = lambda *_outcome: None
