r"""A cluster of one node without a GPU and an autoscaler that may add two with one, and two jobs on it.

Run inside namespaces of its own, which have nothing but loopback and take every process along when they end:

    unshare --user --map-root-user --net --pid --fork --kill-child --mount-proc \
        python growing_cluster.py FOLDER SOURCE CHECKPOINT

The GPUs are Ray's words only. The last line of stdout says what was seen.
"""

import fcntl
import json
import logging
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

# Seconds between looks at the cluster, which are made for nodes that take minutes; read when Ray is imported.
os.environ |= {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_DATA_MIN_GAP_BETWEEN_AUTOSCALING_REQUESTS": "1"}

import ray
from standin import PixelAnswerer

from pipeline.errors import ConfigError
from pipeline.generate import Answer, Pending
from pipeline.job import EngineOptions, Job, Model, Output, Source, Task
from pipeline.run import run
from smolvlm.image import Tiles

HEAD_ID = f"{0:056x}"
PORT = 6379
MAX_NODES = 2
AUTOSCALING = {
    "cluster_name": "growing",
    "max_workers": MAX_NODES,
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 0.2,
    "provider": {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "disable_node_updaters": True,
        "launch_multiple": True,
        "head_node_id": HEAD_ID,
        "gcs_address": f"127.0.0.1:{PORT}",
    },
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0},
        "generate": {
            "resources": {"CPU": 2, "GPU": 1, "object_store_memory": 200_000_000},
            "node_config": {},
            "min_workers": 0,
            "max_workers": MAX_NODES,
        },
    },
    "file_mounts": {},
    "cluster_synced_files": [],
    **{f"{who}setup_commands": [] for who in ("", "head_", "worker_")},
    **{f"{when}_commands": [] for when in ("initialization", "head_start_ray", "worker_start_ray")},
}


class BusyUntilGrown(PixelAnswerer):
    """Takes five seconds an answer until there are as many engines as there can be."""

    def __init__(self, job: Job, engines: Path) -> None:
        super().__init__(job)
        self._engines = engines
        (engines / str(os.getpid())).touch()

    def submit(self, tiles: Tiles, task: Task, seed: int) -> Pending:
        pending = super().submit(tiles, task, seed)

        def wait() -> Answer:
            until = time.monotonic() + 5.0
            while len(list(self._engines.iterdir())) < MAX_NODES and time.monotonic() < until:
                time.sleep(0.1)
            return pending()

        return wait


class Watch:
    """Notes every change of the number of nodes with a GPU."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            found = sum(node["Alive"] and "GPU" in node["Resources"] for node in ray.nodes())  # type: ignore[no-untyped-call]
            if self.seen[-1:] != [found]:
                self.seen.append(found)
            time.sleep(0.2)

    def wait_for(self, count: int, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.seen[-1:] != [count] and time.monotonic() < deadline:
            time.sleep(0.2)


def main() -> None:
    """Try a job that cannot fit, run one that can, and wait until the nodes have gone."""
    folder, source, checkpoint = map(Path, sys.argv[1:])
    raise_loopback()
    with head(folder):
        ray.init(f"127.0.0.1:{PORT}", logging_level=logging.ERROR, log_to_driver=False)
        watch, said = Watch(), list[str]()
        refusal = refused(job(source, folder / "refused", checkpoint, (MAX_NODES + 1, MAX_NODES + 1)))
        (folder / "engines").mkdir()
        factory = partial(BusyUntilGrown, engines=folder / "engines")
        summary = run(
            job(source, folder / "out", checkpoint, (1, MAX_NODES)), say=said.append, answerer_factory=factory
        )
        watch.wait_for(0, seconds=300)
        found = {"refusal": refusal, "said": said, "ok": summary.ok, "gpu_nodes": watch.seen}
        print(json.dumps({**found, "engines": len(list((folder / "engines").iterdir()))}), flush=True)


def job(source: Path, output: Path, checkpoint: Path, replicas: tuple[int, int]) -> Job:
    """Return the job, whose engines want a GPU each."""
    engine = EngineOptions(replicas=replicas, gpus=1, max_num_sequences=4)
    where = (Source(str(source)), Output(str(output)), Model(str(checkpoint)))
    return Job("growing", *where, (Task("caption", "Describe."),), engine=engine)


def refused(job: Job) -> str:
    """Return why the job does not run."""
    try:
        run(job, answerer_factory=PixelAnswerer)
    except ConfigError as error:
        return str(error)
    return ""


@contextmanager
def head(folder: Path) -> Iterator[None]:
    """Run the head node. The namespace ends it, and all that its autoscaler has started."""
    config = folder / "autoscaling.json"
    config.write_text(json.dumps(AUTOSCALING))
    node = {"RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID}
    environment = {**os.environ, **node, "RAY_NODE_TYPE_NAME": "ray.head.default", "RAY_FAKE_CLUSTER": "1"}
    options = ["--head", "--block", f"--port={PORT}", "--node-ip-address=127.0.0.1", f"--temp-dir={folder / 'ray'}"]
    options += ["--num-cpus=2", "--num-gpus=0", "--object-store-memory=200000000", "--include-dashboard=false"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options, f"--autoscaling-config={config}"]
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment | {"RAY_enable_autoscaler_v2": "1"}, stdout=log, stderr=log)
    while b"Ray runtime started" not in (folder / "head.log").read_bytes():
        assert process.poll() is None, (folder / "head.log").read_text()
        time.sleep(0.2)
    yield


def raise_loopback() -> None:
    """Turn on the only interface of a new network namespace: ioctl SIOCSIFFLAGS with IFF_UP and IFF_RUNNING."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14x", b"lo", 0x1 | 0x40))


if __name__ == "__main__":
    main()
