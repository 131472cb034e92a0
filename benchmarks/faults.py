"""A job that is struck all along: workers killed, nodes lost and replaced, drivers killed and started again.

    python benchmarks/faults.py [--smoke] [--images N] [--workers N] [--nodes N] [--drivers N] [--seed N]

Several Ray nodes on this machine work on small images in tars. The engine is a stand-in that gives a fixed number of
answers a second, each of them a digest of the pixels, so that a lost, doubled or mixed-up image shows, and so that
throughput tells how many engines are at work. Faults come at random moments, by a seed: SIGKILL to a worker, an actor
or a decoder; to all processes of a node, with another node coming ten seconds later; to the driver, with a new `run`
into the same output right after. In the end the rows must be those that the pixels ask for, each once.

Throughput is back when a window of five seconds has 90 % of the answers that it had before the first fault; the time
counts from the moment when the capacity is there again: the kill of a worker, the new node's start, the new driver's
start. The engines keep the last tenth of the answers back until all faults have struck, and a driver is killed
once something is committed, so that neither hangs on the machine's speed. The last line of stdout is one JSON object;
the exit code is 1 if a row is lost, doubled or wrong.
"""

import argparse
import functools
import io
import json
import logging
import os
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
from measuring.stand_ins import use_stand_ins
from PIL import Image
from rich.console import Console

use_stand_ins()

import ray
from faulting.meter import Meter, Strike, timeline, watching
from ray.cluster_utils import Cluster
from standin import PixelAnswerer, set_limit, text_of

from jobs.verify import verify
from pipeline.generate import Pending
from pipeline.job import EngineOptions, ImageOptions, Job, Model, Output, Source, Task
from pipeline.run import run
from smolvlm.config import ImageConfig
from smolvlm.image import ImagePolicy, Tiles, decode_image, split_image
from smolvlm.scratch import create_checkpoint

TASK = Task("caption", "Describe this image.", max_new_tokens=32)
IMAGES_PER_TAR = 1000
BROKEN_EVERY = 50
ENGINES = NODES = 3
WORKER = re.compile(r"ray::(MapWorker|Write|StreamingRepartition|ReadManifest|Board)|pipeline\.decode_process")


@dataclass(frozen=True)
class Setting:
    """How much work there is, and how often it is struck.

    `rate`: answers a second of one engine; `steady_s`: time to come up to speed; `gap_s`: the longest pause between two
    faults; `away_s`: time until another node comes; `patience_s`: how long to wait, after a node or a driver, until
    throughput is back.
    """

    images: int
    workers: int
    nodes: int
    drivers: int
    rate: float
    steady_s: float
    gap_s: float
    away_s: float
    patience_s: float


class PacedAnswerer(PixelAnswerer):
    """Answers one image after the other, at the pace of an engine."""

    def __init__(self, job: Job, rate: float, log: Path, limit: Path) -> None:
        super().__init__(job, delay_s=1 / rate, log=log, limit=limit)
        self._turn = threading.Lock()

    def submit(self, tiles: Tiles, task: Task, seed: int) -> Pending:
        """Queue one image."""
        answer = super().submit(tiles, task, seed)

        def wait() -> Any:
            with self._turn:
                return answer()

        return wait


def drive(address: str, folder: Path, images: int, rate: float) -> None:
    """Run the job on the cluster at `address`, from this process."""
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    engine = EngineOptions(replicas=(ENGINES, ENGINES), cpus=1.0, prepare_workers=(1, 2))
    job = Job(
        "faults",
        Source(str(folder / "tars")),
        Output(str(folder / "out"), rows_per_file=max(images // 64, 16)),
        Model(str(folder / "model")),
        (TASK,),
        image=ImageOptions(splitting=False, upscale=False),
        engine=engine,
    )
    factory = functools.partial(PacedAnswerer, rate=rate, log=folder / "answers.log", limit=folder / "limit")
    summary = run(job, answerer_factory=factory)
    print(json.dumps({"rows": summary.rows, "resumed": summary.resumed_rows}), flush=True)


class Bed:
    """The cluster, the driver, and the ways to hurt them."""

    def __init__(self, folder: Path, setting: Setting, meter: Meter, rng: random.Random) -> None:
        self._folder, self._setting, self._meter, self._rng = folder, setting, meter, rng
        head = {"num_cpus": 2, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes = [self._cluster.add_node(num_cpus=2) for _ in range(NODES)]
        self.driver = self._start_driver()

    def worker(self) -> Strike:
        """Kill an actor, a task's process or a decoder."""
        while not (victims := self._workers()):
            time.sleep(0.2)
        self._rng.choice(victims).kill()
        return Strike("worker", self._meter.now, self._meter.now)

    def node(self) -> Strike:
        """Kill all of a node at once; another comes a while later."""
        node = self._nodes.pop(self._rng.randrange(len(self._nodes)))
        processes = [psutil.Process(info.process.pid) for infos in node.all_processes.values() for info in infos]
        for process in [child for each in processes for child in (each, *each.children(recursive=True))]:
            kill(process)
        at = self._meter.now
        self._cluster.remove_node(node, allow_graceful=False)
        time.sleep(self._setting.away_s)
        self._nodes.append(self._cluster.add_node(num_cpus=2))
        return Strike("node", at, self._meter.now)

    def kill_driver(self) -> Strike:
        """Kill the driver, which has committed something, and start another."""
        while not list((self._folder / "out" / "data").glob("*.parquet")):
            check_runs(self, self._meter)
        kill(psutil.Process(self.driver.pid))
        self.driver.communicate()
        at = self._meter.now
        self.driver = self._start_driver()
        return Strike("driver", at, at)

    def close(self) -> None:
        """End all of it."""
        self.driver.kill()
        self.driver.wait()
        self._cluster.shutdown()

    def _start_driver(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, __file__, "--driver", self._cluster.address, "--folder", str(self._folder)]
        work = ["--images", str(self._setting.images), "--rate", str(self._setting.rate)]
        with (self._folder / "driver.log").open("ab") as log:
            return subprocess.Popen([*command, *work], stdout=subprocess.PIPE, stderr=log)

    def _workers(self) -> list[psutil.Process]:
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                if WORKER.search(" ".join(process.cmdline())):
                    found.append(process)
            except psutil.Error:
                continue  # it ended
        return found


def kill(process: psutil.Process) -> None:
    """Kill it, if it still runs."""
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def strike_all(bed: Bed, meter: Meter, setting: Setting, rng: random.Random) -> tuple[float, list[Strike]]:
    """Let the run come up to speed, then strike it again and again; return its undisturbed rate and the strikes."""
    while not (meter.answers and meter.answers[-1]):
        check_runs(bed, meter)
    time.sleep(setting.steady_s)
    steady = meter.rate(meter.now - setting.steady_s + 1, meter.now - 1)
    strikes: list[Strike] = []
    plan = ["worker"] * setting.workers + ["node"] * setting.nodes + ["driver"] * setting.drivers
    rng.shuffle(plan)
    for kind in plan:
        time.sleep(rng.uniform(0.5, setting.gap_s))
        check_runs(bed, meter)
        strikes.append({"worker": bed.worker, "node": bed.node, "driver": bed.kill_driver}[kind]())
        print(f"{strikes[-1].at:7.1f} s  {kind} killed", flush=True)
        patience = meter.now + (0 if kind == "worker" else setting.patience_s)
        while meter.now < patience and meter.back_after(strikes[-1].capacity_at, steady) is None:
            check_runs(bed, meter)
    return steady, strikes


def check_runs(bed: Bed, meter: Meter) -> None:
    """Wait a little; raise if the run is over or stands still."""
    time.sleep(0.25)
    meter.check_moves()
    if bed.driver.poll() is not None:
        raise RuntimeError(f"the run ended, with code {bed.driver.returncode}, before all faults had struck")


def finish(bed: Bed, meter: Meter) -> dict[str, int]:
    """Wait for the last driver and return what it printed."""
    while bed.driver.poll() is None:
        time.sleep(0.25)
        meter.check_moves()
    out, _ = bed.driver.communicate()
    if bed.driver.returncode:
        raise RuntimeError(f"the last driver ended with code {bed.driver.returncode}")
    said: dict[str, int] = json.loads(next(line for line in out.splitlines() if line.startswith(b"{")))
    return said


def write_inputs(folder: Path, images: int) -> dict[tuple[str, str], str]:
    """Write images, some of them broken, into tars; return what each one's row must say."""
    folder.mkdir()
    expected = {}
    rng = np.random.default_rng(0)
    config = ImageConfig.from_pretrained(folder.parent / "model")
    policy = ImagePolicy(upscale=False, image_splitting=False)
    for first in range(0, images, IMAGES_PER_TAR):
        path = folder / f"{first:08d}.tar"
        with tarfile.open(path, "w") as archive:
            for index in range(first, min(first + IMAGES_PER_TAR, images)):
                data, name = picture(rng, index), f"{index:08d}.png"
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
                text = "not_an_image"
                if index % BROKEN_EVERY:
                    text = text_of(split_image(decode_image(data).image, config, policy), TASK, 0)
                expected[str(path), name] = text
    return expected


def picture(rng: np.random.Generator, index: int) -> bytes:
    """Return a small PNG of noise, or something that is none."""
    if index % BROKEN_EVERY == 0:
        return b"not an image"
    target = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(target, "PNG")
    return target.getvalue()


def compare(output: Path, expected: dict[tuple[str, str], str]) -> dict[str, int]:
    """Hold the output against the pixels."""
    rows = pq.read_table(output / "data").to_pylist()
    counts = Counter((row["uri"], row["member"]) for row in rows)
    texts = {
        (row["uri"], row["member"]): row["caption"]["text"] if row["caption"] else row["error"]["code"] for row in rows
    }
    report = verify(str(output))
    return {
        "rows": len(rows),
        "lost": len(expected.keys() - counts.keys()) + report.missing,
        "doubled": sum(count - 1 for count in counts.values()) + report.duplicate,
        "wrong": sum(expected.get(key) != text for key, text in texts.items()),
        "unreadable_files": report.unreadable,
    }


def soak(folder: Path, setting: Setting, seed: int) -> dict[str, Any]:
    """Run the job under all faults and return what came out."""
    create_checkpoint(folder / "model", "tiny")
    expected = write_inputs(folder / "tars", setting.images)
    meter, rng = Meter(folder / "answers.log"), random.Random(seed)
    set_limit(folder / "limit", setting.images * 9 // 10)
    bed = Bed(folder, setting, meter, rng)
    try:
        with watching(meter):
            steady, strikes = strike_all(bed, meter, setting, rng)
            set_limit(folder / "limit", sys.maxsize)
            said = finish(bed, meter)
    except RuntimeError as error:
        raise SystemExit(f"{error}\n{(folder / 'driver.log').read_text()[-3000:]}") from error
    finally:
        bed.close()
    Console(width=120).print(timeline(meter, strikes))
    back: dict[str, list[float | None]] = {kind: [] for kind in ("worker", "node", "driver")}
    for strike in strikes:
        after = meter.back_after(strike.capacity_at, steady)
        back[strike.kind].append(None if after is None else round(after, 1))
    return {
        "images": setting.images,
        **compare(folder / "out", expected),
        "resumed": said["resumed"],
        "answers": meter.answers[-1],
        "seconds": round(meter.times[-1], 1),
        "steady_per_s": round(steady, 1),
        "strikes": Counter(strike.kind for strike in strikes),
        "back_after_s": back,
    }


def main() -> int:
    """Soak a job in faults and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few images and faults: shows that it runs")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=20, help="workers to kill")
    parser.add_argument("--nodes", type=int, default=6, help="nodes to lose")
    parser.add_argument("--drivers", type=int, default=3, help="drivers to kill")
    parser.add_argument("--rate", type=float, default=20.0, help="answers a second of an engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--driver", help=argparse.SUPPRESS)  # a driver process of this very benchmark
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.driver:
        drive(arguments.driver, arguments.folder, arguments.images, arguments.rate)
        return 0
    faults = (arguments.workers, arguments.nodes, arguments.drivers)
    setting = Setting(arguments.images, *faults, arguments.rate, 20.0, 6.0, away_s=10.0, patience_s=90.0)
    if arguments.smoke:
        setting = Setting(300, 2, 1, 1, 4.0, 4.0, 2.0, away_s=2.0, patience_s=0.0)
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), setting, arguments.seed)
    print(json.dumps({**found, "ray": ray.__version__, "cpus": os.cpu_count()}))
    return int(any(found[name] for name in ("lost", "doubled", "wrong", "unreadable_files")))


if __name__ == "__main__":
    sys.exit(main())
