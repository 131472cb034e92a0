"""The Ray Data graph: manifest → prepare (CPU actors) → generate (engine actors) → Parquet.

Every task takes one block and gives one block of the same rows. Ray rebuilds a lost block by running its task again,
and only a task whose rows are a function of its input can be run again without losing or doubling any.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.data.context import AutoscalingConfig

from pipeline import ranges
from pipeline.control import Control
from pipeline.datasource import ManifestSource
from pipeline.end_of_reading import EndOfReading
from pipeline.errors import PipelineError
from pipeline.generate import AnswererFactory, GenerateWorker
from pipeline.job import Job
from pipeline.manifest import Manifest
from pipeline.prepare import PrepareWorker
from pipeline.ranges import Ranges
from pipeline.resources import READ_CPUS, WRITE_CPUS, Resources
from pipeline.sink import CommitSink
from pipeline.storage import Location

_PREPARE_CALLS = 2  # one decodes while the other fetches
# A pool's use is its calls under way by all that its actors take at once. Ray's own bound for growth, 1.75, lies beyond
# what `_pool` lets an actor hold, and would keep every pool at its smallest. An engine takes two batches at once, so a
# quarter is half a batch: one of them can go. Only an actor without a call is ever taken away.
_GROW_AT = 1.0
_SHRINK_AT = 0.25


def execute(
    job: Job,
    destination: Location,
    manifest: Manifest,
    pending: Ranges,
    resources: Resources,
    sink: CommitSink,
    answerer_factory: AnswererFactory,
    control: Control,
) -> None:
    """Run all pending rows through the graph; returns when the last file is committed.

    Raises PipelineError with Ray's cause if it stops before; what was committed stays.
    """
    rows = ranges.count(pending)
    with _data_context(control), _ray_errors(destination):
        source = ManifestSource(destination, manifest, pending)
        (
            ray.data.read_datasource(source, num_cpus=READ_CPUS, override_num_blocks=resources.num_read_tasks)
            .repartition(target_num_rows_per_block=resources.rows_per_block(rows))
            .map_batches(
                PrepareWorker,
                fn_constructor_args=(job, resources.image_config, control, resources.prepare_workers[1]),
                compute=_pool(resources.prepare_workers, _PREPARE_CALLS),
                num_cpus=resources.prepare_cpus,
                batch_size=None,
                batch_format="pyarrow",
            )
            # `map_batches` wants a batch size where there are GPUs, and would merge blocks to reach it.
            .map_batches_internal(
                GenerateWorker,
                fn_constructor_args=(job, answerer_factory, control),
                compute=_pool(job.engine.replicas, resources.blocks_per_engine(rows)),
                num_cpus=resources.engine_cpus,
                num_gpus=resources.engine_gpus,
                batch_size=None,
                batch_format="pyarrow",
            )
            .write_datasink(sink, ray_remote_args={"num_cpus": WRITE_CPUS})
        )


def _pool(size: tuple[int, int], calls: int) -> ActorPoolStrategy:
    return ActorPoolStrategy(
        min_size=size[0],
        max_size=size[1],
        max_concurrent_calls_per_actor=calls,
        max_tasks_in_flight_per_actor=calls + 1,
        enable_true_multi_threading=True,
    )


@contextmanager
def _ray_errors(destination: Location) -> Iterator[None]:
    """Say what ended the run in one sentence; the whole story is the cause."""
    try:
        yield
    except ray.exceptions.RayError as error:
        raise PipelineError(
            f"the run stopped: {_root_cause(error)}\nWhat is committed in {destination.uri} stays; run the same job "
            "again to go on from there."
        ) from error


def _root_cause(error: BaseException) -> str:
    """Return the line of a worker's traceback that says what went wrong; Ray carries it as text, root first."""
    lines = [line.strip() for line in str(error).splitlines()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit|Interrupt)\b: ", line)]
    return (named or [line for line in lines if line] or [type(error).__name__])[0]


@contextmanager
def _data_context(control: Control) -> Iterator[None]:
    """Ray Data's settings for this graph, put back afterwards."""
    context = DataContext.get_current()
    wanted = {
        "target_max_block_size": None,  # one block in, one block out
        "enable_progress_bars": False,
        "autoscaling_config": AutoscalingConfig(_GROW_AT, _SHRINK_AT),
        "custom_execution_callback_classes": [partial(EndOfReading, control)],  # Ray calls each without arguments
    }
    before = {name: getattr(context, name) for name in wanted}
    for name, value in wanted.items():
        setattr(context, name, value)
    try:
        with warnings.catch_warnings():
            # Fewer blocks than workers: what a drain leaves of a job, and advice on Ray's own settings.
            warnings.filterwarnings("ignore", "The minimum number of concurrent actors")
            yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
