"""Real parts for the tests: one S3 server, one Ray, one tiny checkpoint for the whole session."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports Ray: workers find the stand-in engine, and nothing is reported anywhere.
SUPPORT = str(Path(__file__).parent / "support")
sys.path.insert(0, SUPPORT)
os.environ["PYTHONPATH"] = os.pathsep.join([SUPPORT, os.environ.get("PYTHONPATH", "")])
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_AUTH_MODE"] = "disabled"
# At Ray's 15, whatever else runs on the machine goes before the workers, and a run seems to stand still.
os.environ |= {"RAY_worker_niceness": "0"}
# Before anything imports Triton: kernels run interpreted, on a CPU. To try them on a GPU: TRITON_INTERPRET=0.
os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a random checkpoint that loads and generates in milliseconds."""
    from smolvlm.scratch import create_checkpoint

    return create_checkpoint(tmp_path_factory.mktemp("checkpoint"), "tiny")


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """Run a SeaweedFS server with a bucket `test` and return its endpoint; credentials stand in the environment."""
    from jobs.s3_server import s3_server
    from pipeline.storage import Location

    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        Location("s3://test", server.endpoint_url).fs.mkdir("test")
        yield server.endpoint_url


@pytest.fixture(scope="session")
def ray_cluster(s3: str) -> Iterator[str]:
    """Run Ray with two CPUs, workers inheriting the S3 credentials, and return its address."""
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    yield str(ray.get_runtime_context().gcs_address)
    ray.shutdown()
