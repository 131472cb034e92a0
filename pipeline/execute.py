"""The Ray Data graph: manifest → prepare (CPU actors) → generate (engine actors) → Parquet.

Every task takes one block and gives one block of the same rows. Ray rebuilds a lost block by running its task again,
and only a task whose rows are a function of its input can be run again without losing or doubling any.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.data import ActorPoolStrategy, DataContext

from pipeline.control import Control
from pipeline.datasource import ManifestSource
from pipeline.generate import AnswererFactory, GenerateWorker
from pipeline.job import Job
from pipeline.manifest import Manifest
from pipeline.prepare import PrepareWorker
from pipeline.ranges import Ranges
from pipeline.resources import READ_CPUS, WRITE_CPUS, Resources
from pipeline.sink import CommitSink
from pipeline.storage import Location

# Ray's default is to try for ever; a worker that dies this often dies of what it is given.
MAX_WORKER_LIVES = 100
_MAX_BLOCK_RETRIES = 20
_PREPARE_CALLS = 2  # one decodes while the other fetches
_SUPERVISION = {"max_restarts": MAX_WORKER_LIVES, "max_task_retries": _MAX_BLOCK_RETRIES}


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
    """Run all pending rows through the graph; returns when the last file is committed."""
    with _data_context():
        source = ManifestSource(destination, manifest, pending)
        (
            ray.data.read_datasource(source, num_cpus=READ_CPUS, override_num_blocks=resources.num_read_tasks)
            .repartition(target_num_rows_per_block=resources.rows_per_block)
            .map_batches(
                PrepareWorker,
                fn_constructor_args=(job, resources.image_config, control),
                compute=_pool(resources.prepare_workers, _PREPARE_CALLS),
                num_cpus=resources.prepare_cpus,
                **_WORKER_OPTIONS,
            )
            .map_batches(
                GenerateWorker,
                fn_constructor_args=(job, answerer_factory, control),
                compute=_pool(job.engine.replicas, resources.blocks_per_engine),
                num_cpus=resources.engine_cpus,
                num_gpus=job.engine.gpus,
                **_WORKER_OPTIONS,
            )
            .write_datasink(sink, ray_remote_args={"num_cpus": WRITE_CPUS, "max_retries": _MAX_BLOCK_RETRIES})
        )


_WORKER_OPTIONS = {"batch_size": None, "batch_format": "pyarrow", **_SUPERVISION}


def _pool(size: tuple[int, int], calls: int) -> ActorPoolStrategy:
    return ActorPoolStrategy(
        min_size=size[0],
        max_size=size[1],
        max_concurrent_calls_per_actor=calls,
        max_tasks_in_flight_per_actor=calls + 1,
        enable_true_multi_threading=True,
    )


@contextmanager
def _data_context() -> Iterator[None]:
    """Ray Data's settings for this graph, put back afterwards."""
    context = DataContext.get_current()
    wanted = {
        "target_max_block_size": None,  # one block in, one block out
        "enable_progress_bars": False,
        "execution_options": context.execution_options,
    }
    before = {name: getattr(context, name) for name in wanted}
    for name, value in wanted.items():
        setattr(context, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
