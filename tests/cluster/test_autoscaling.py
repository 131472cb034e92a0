"""GPU nodes come when a job needs them and go when it has ended: Ray's own autoscaler, on nodes that are pretended."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from noise import write_noise
from standin import text_of

from pipeline.job import Task
from smolvlm.config import ImageConfig
from smolvlm.image import ImagePolicy, decode_image, split_image

SCRIPT = Path(__file__).parents[1] / "support" / "growing_cluster.py"
# Pretended nodes listen on the machine's address and outlive a head that is killed; in namespaces they do neither.
ALONE = ["unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
NUM_IMAGES = 128


def can_be_alone() -> bool:
    return subprocess.run([*ALONE, "true"], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_noise(tmp_path_factory.mktemp("images"), NUM_IMAGES)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Yield a folder with a short name: sockets with long ones cannot be opened."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.mark.skipif(not can_be_alone(), reason="no namespaces for an unprivileged user on this machine")
@pytest.mark.timeout(900)
def test_nodes_come_with_a_job_and_go_with_it(images: Path, tiny_checkpoint: Path, short_folder: Path) -> None:
    command = [*ALONE, sys.executable, str(SCRIPT), str(short_folder), str(images), str(tiny_checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=890)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "engine.gpus = 1 for 3 replicas, but the cluster has 0 GPUs" in found["refusal"]
    assert found["refusal"].endswith("or allow its autoscaler more or larger nodes.")
    (said,) = found["said"]
    assert said.startswith("waiting for nodes: the job needs 1 GPUs and 3.2 CPUs at least, the cluster has 0 GPUs")
    assert (found["gpu_nodes"][0], max(found["gpu_nodes"]), found["gpu_nodes"][-1]) == (0, 2, 0)
    assert found["engines"] == 2
    assert texts(short_folder / "out") == expected(images, tiny_checkpoint)


def texts(output: Path) -> dict[str, str]:
    rows = pq.read_table(output / "data").to_pylist()
    assert len(rows) == NUM_IMAGES
    return {Path(row["uri"]).name: row["caption"]["text"] for row in rows}


def expected(images: Path, checkpoint: Path) -> dict[str, str]:
    """Return the stand-in's text for every image, made here, without Ray."""
    config, policy = ImageConfig.from_pretrained(checkpoint), ImagePolicy()
    task = Task("caption", "Describe.")
    return {
        path.name: text_of(split_image(decode_image(path.read_bytes()).image, config, policy), task, 0)
        for path in images.iterdir()
    }
