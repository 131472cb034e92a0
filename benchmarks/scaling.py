"""A whole job on clusters of 1, 2 and 4 nodes, with engines that sleep: what is lost by being distributed.

    python benchmarks/scaling.py [--smoke] [--repeats N] [--nodes 1 2 4] [--images N] [--rate R]

Every node has one engine that answers R images a second and no more, whatever the machine can do. So n nodes cannot
exceed n × R, which is the limit given beside each figure; what is missing from it went to listing, blocks, scheduling,
commits and engines that ended before the others. Images grow with the nodes. Time runs from the moment when every
engine has its first image to the end of the run, `_SUCCESS.json` included. Starting is left out: the processes of all
nodes start on the cores of this one machine. Choose R so that preparing n × R images a second leaves them room.

Efficiency is images a second and node, against one node's. The last line of stdout is one JSON object.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import numpy as np
import ray
from PIL import Image
from ray.cluster_utils import Cluster
from rich.console import Console
from rich.table import Table

from pipeline.generate import Answer, Pending
from pipeline.job import EngineOptions, ImageOptions, Job, Model, Output, Source, Task
from pipeline.run import run
from smolvlm.image import Tiles
from smolvlm.scratch import create_checkpoint

NODE: dict[str, Any] = {"num_cpus": 4, "num_gpus": 1, "object_store_memory": 300_000_000}
START_S = 300.0


class SleepingEngine:
    """Answers `rate` images a second, one after the other, as soon as `engines` of them have an image."""

    def __init__(self, job: Job, rate: float, engines: int, folder: Path) -> None:
        self._answer_s, self._engines, self._folder = 1 / rate, engines, folder
        self._busy = threading.Lock()
        self._free_at = 0.0
        self._asked = threading.Lock()

    def submit(self, tiles: Tiles, task: Task, seed: int) -> Pending:
        """Queue an image; its turn comes when those before it are answered, however late their threads wake up."""
        if self._asked.acquire(blocking=False):  # once, and never given back
            (self._folder / str(os.getpid())).touch()
        return partial(self._wait, time.time())

    def _wait(self, asked_at: float) -> Answer:
        with self._busy:
            if not self._free_at:
                self._free_at = all_asked(self._folder, self._engines)
            self._free_at = max(self._free_at, asked_at) + self._answer_s
            time.sleep(max(0.0, self._free_at - time.time()))
        return Answer("slept", "stop", 1, 1, 0.0)

    def close(self) -> None:
        """Nothing to stop."""


def all_asked(folder: Path, engines: int) -> float:
    """Wait for the file of every engine and return when the last one got an image, in seconds since the epoch."""
    deadline = time.monotonic() + START_S
    while len(files := list(folder.iterdir())) < engines:
        assert time.monotonic() < deadline, f"{len(files)} of {engines} engines got an image within {START_S:g} s"
        time.sleep(0.02)
    return max(path.stat().st_mtime for path in files)


def rate_on(nodes: int, source: Path, checkpoint: Path, arguments: argparse.Namespace) -> float:
    """Return images per second of one job over all nodes."""
    images = nodes * arguments.images
    with tempfile.TemporaryDirectory() as folder:
        engines = Path(folder, "engines")
        engines.mkdir()
        job = Job(
            name="scaling",
            source=Source(str(source)),
            output=Output(folder + "/out"),
            model=Model(str(checkpoint)),
            tasks=(Task("caption", "Describe."),),
            image=ImageOptions(splitting=False, upscale=False),
            engine=EngineOptions(replicas=(nodes, nodes), gpus=1, prepare_workers=(nodes, nodes), max_num_sequences=16),
            limit=images,
        )
        factory = partial(SleepingEngine, rate=arguments.rate, engines=nodes, folder=engines)
        summary = run(job, answerer_factory=factory)
        ended = time.time()
        assert summary.ok == images, summary
        return float(images / (ended - all_asked(engines, nodes)))


def measure(nodes: int, source: Path, checkpoint: Path, arguments: argparse.Namespace) -> float:
    """Start a cluster of `nodes` nodes, run the job on it and return its rate."""
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            cluster.add_node(**NODE)
        cluster.wait_for_nodes()
        ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        return rate_on(nodes, source, checkpoint, arguments)
    finally:
        ray.shutdown()
        cluster.shutdown()


def write_images(folder: Path, images: int) -> Path:
    """Write `images` small JPEGs and return the folder."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(images):
        pixels = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((96, 72))
        pixels.save(folder / f"{index:06d}.jpg", quality=85)
    return folder


def report(rates: dict[int, list[float]], limit: float) -> list[dict[str, float]]:
    """Print a line for every size of cluster and return the same as objects."""
    medians = {nodes: statistics.median(values) for nodes, values in rates.items()}
    fewest = min(medians)
    table = Table(
        "nodes", "images/s (median)", "min", "max", "limit", "of limit", "efficiency", title="sleeping engines"
    )
    rows = []
    for nodes, rate in medians.items():
        row = {
            "nodes": nodes,
            "images_per_s": round(rate, 2),
            "limit": nodes * limit,
            "of_limit": round(rate / (nodes * limit), 3),
            "efficiency": round(rate / nodes / (medians[fewest] / fewest), 3),
        }
        low, high = f"{min(rates[nodes]):.1f}", f"{max(rates[nodes]):.1f}"
        shares = (f"{row['of_limit']:.1%}", f"{row['efficiency']:.1%}")
        table.add_row(str(nodes), f"{rate:.1f}", low, high, f"{row['limit']:g}", *shares)
        rows.append(row)
    Console(width=120).print(table)
    return rows


def main() -> None:
    """Let the sizes take turns and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny inputs, once: shows that it runs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4], help="sizes of cluster to try")
    parser.add_argument("--images", type=int, default=1200, help="images for every node")
    parser.add_argument("--rate", type=float, default=20.0, help="images a second of one engine")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.repeats, arguments.nodes, arguments.images, arguments.rate = 1, [1, 2], 40, 100.0
    rates: dict[int, list[float]] = {nodes: [] for nodes in arguments.nodes}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = create_checkpoint(Path(folder, "tiny"), "tiny")
        source = write_images(Path(folder, "images"), max(arguments.nodes) * arguments.images)
        for _ in range(arguments.repeats):
            for nodes in arguments.nodes:
                rates[nodes].append(measure(nodes, source, checkpoint, arguments))
    rows = report(rates, arguments.rate)
    versions = {"python": platform.python_version(), "ray": ray.__version__, "cpus": os.cpu_count()}
    print(json.dumps({"ours": rows[-1]["efficiency"], "limit": 1.0, "clusters": rows, **versions}))


if __name__ == "__main__":
    main()
