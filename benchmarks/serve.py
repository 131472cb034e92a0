"""The endpoint under load: overhead of the gateway, time to first token idle and beside a batch job, and a peer.

    python benchmarks/serve.py --size 256m --dtype bfloat16 [--repeats 3] [--rows 160] [--smoke]

Everything runs on one machine: `smolvlm serve`'s own application on a local Ray, its clients, and a batch job that
shares the engine (`engine: {mode: shared}`). Weights are random, pictures look like photographs, and answers are
`--tokens` long; or `--size bundled`: the bundled model reads documents, and an answer is as long as its text.

overhead   one request after the other, a 512-pixel JPEG, one token: the client's time less the engine's (total), and
           less Ray's way there and back as well (gateway)
idle       streaming requests one at a time: time to first token
saturated  the batch job alone, and again with one streaming request a second beside it, in turns; batch throughput is
           tokens a second between the job's first and last token, the requests' own tokens taken off
peer       a plain loop: FastAPI before transformers' `generate`, one request at a time, same weights and preparation;
           requests a second at 8 at once, and the latency of one

The last line of stdout is one JSON object.
"""

import argparse
import io
import json
import logging
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import httpx2
import ray
from ray import serve
from serving.load import (
    AT_ONCE,
    POLL_S,
    Asking,
    Questions,
    Streamed,
    at_once,
    first_tokens,
    idle,
    one_by_one,
    overhead_ms,
    photograph,
    stream,
)

from pipeline.endpoint.client import EngineStatus
from pipeline.endpoint.options import EndpointOptions
from pipeline.job import EngineOptions, ImageOptions, Job, Model, Output, Source, Task
from pipeline.run import run
from pipeline.serve import engines_handle, start
from smolvlm.hub import BUNDLED, resolve_checkpoint
from smolvlm.scratch import SIZES, create_checkpoint

ONE_TILE = ImageOptions(splitting=False, upscale=False, timeout_s=5.0)
PEER = Path(__file__).parent / "serving" / "peer.py"


@dataclass(frozen=True)
class Batch:
    """One run of the job: tokens a second while it was at work, and the requests answered beside it."""

    tokens_per_s: float
    requests: list[Streamed]


def batch(job: Job, folder: Path, ask: Callable[[], Streamed] | None) -> Batch:
    """Run the job; with `ask`, once a second from its first token to its last."""
    job = Job(**{**vars(job), "output": Output(str(folder))})
    moments: list[tuple[float, int]] = []
    done = threading.Event()
    watching = threading.Thread(target=watch, args=(moments, done))
    watching.start()
    asking = Asking(ask)
    try:
        asking.begin(lambda: moments and moments[-1][1] > moments[0][1], done)
        run(job)
    finally:
        done.set()
        watching.join()
    requests = asking.results()
    first = next(index for index, (_, count) in enumerate(moments) if count > moments[0][1])
    last = next(index for index, (_, count) in enumerate(moments) if count == moments[-1][1])
    tokens = moments[last][1] - moments[first][1] - sum(each.tokens for each in requests)
    return Batch(tokens / (moments[last][0] - moments[first][0]), requests)


def watch(moments: list[tuple[float, int]], done: threading.Event) -> None:
    """Note the engine's token count, some times a second."""
    engines = engines_handle()
    while not done.is_set():
        statuses: list[EngineStatus] = engines.broadcast("status").results(timeout_s=60)
        moments.append((time.perf_counter(), sum(status.stats["generated_tokens"] for status in statuses)))
        time.sleep(POLL_S)


@contextmanager
def running_peer(checkpoint: Path, arguments: argparse.Namespace) -> Iterator[str]:
    """Run the peer until the block ends."""
    port = free_port()
    command = [sys.executable, PEER, checkpoint, str(port), arguments.dtype, str(arguments.threads)]
    with subprocess.Popen(command) as process:
        try:
            wait_for_port(port)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


@contextmanager
def running_endpoint(checkpoint: Path, arguments: argparse.Namespace) -> Iterator[EndpointOptions]:
    """Run ours until the block ends."""
    options = EndpointOptions(
        Model(str(checkpoint), dtype=arguments.dtype),
        port=free_port(),
        image=ONE_TILE,
        engine=EngineOptions(threads=arguments.threads),
    )
    start(options)
    try:
        yield options
    finally:
        serve.shutdown()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def wait_for_port(port: int) -> None:
    """Return once somebody listens; raises TimeoutError after five minutes."""
    for _ in range(3000):
        with socket.socket() as attempt:
            if attempt.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"nobody listens on port {port}")


def prepare_checkpoint(directory: Path, arguments: argparse.Namespace) -> Path:
    """The bundled checkpoint, or a new one with random weights."""
    if arguments.size == BUNDLED:
        return resolve_checkpoint(BUNDLED)
    return create_checkpoint(directory / arguments.size, arguments.size, dtype=arguments.dtype)


def questions_of(model: str, size: str) -> Questions:
    """What suits the weights: random ones describe photographs, the bundled model reads documents."""
    if size != BUNDLED:
        return Questions(model, "Describe this image.", photograph)
    from smolvlm.training.documents import DocumentGenerator, DocumentOptions

    generator = DocumentGenerator("held_out", 0, DocumentOptions())

    def document(number: int) -> bytes:
        file = io.BytesIO()
        generator.document(number).image.save(file, "JPEG", quality=90)
        return file.getvalue()

    return Questions(model, "Transcribe all text.", document)


def measure_ours(checkpoint: Path, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All that concerns our endpoint."""
    with running_endpoint(checkpoint, arguments) as options:
        url, questions = f"http://127.0.0.1:{options.port}", questions_of(options.model_name, arguments.size)
        for number in range(arguments.rows):
            (folder / f"{number:05d}.jpg").write_bytes(questions.draw(number))
        overhead = overhead_ms(url, replace(questions, draw=photograph), arguments.requests)
        alone = first_tokens(idle(url, questions, arguments.requests, arguments.tokens))
        task = Task("read", questions.prompt, max_new_tokens=arguments.tokens)
        job = Job("serve", Source(str(folder)), Output(""), options.model, (task,), ONE_TILE, EngineOptions("shared"))
        beside, speeds = saturated(url, questions, job, arguments.repeats)
        return {
            "overhead_ms": overhead,
            "first_token_s": {"idle": alone, "saturated": beside},
            "first_token_p95_ratio": round(beside["p95"] / alone["p95"], 2),
            "batch_tokens_per_s": {name: round(speed, 2) for name, speed in speeds.items()},
            "batch_share_kept": round(speeds["beside"] / speeds["alone"], 3),
            "answered_share": 1.0,  # a request that was not answered has ended the benchmark
            "latency_s": round(one_by_one(url, questions, arguments.peer_requests, arguments.tokens), 4),
            "requests_per_s": round(at_once(url, questions, 2 * AT_ONCE, arguments.tokens), 4),
        }


def saturated(url: str, questions: Questions, job: Job, repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """The job alone and beside requests, in turns: the requests' first tokens, and the job's median tokens a second."""
    numbers = iter(range(10_000, 10_000_000))
    runs: dict[str, list[Batch]] = {"alone": [], "beside": []}
    with httpx2.Client(base_url=url, timeout=600) as client:

        def ask() -> Streamed:
            return stream(client, questions.streaming(next(numbers), 16))

        for repeat in range(repeats):
            for name, asked in (("alone", None), ("beside", ask)):
                with tempfile.TemporaryDirectory() as output:
                    runs[name].append(batch(job, Path(output) / "out", asked))
                print(f"{name} {repeat + 1}: {runs[name][-1].tokens_per_s:.1f} tokens/s", flush=True)
    speeds = {name: statistics.median(each.tokens_per_s for each in found) for name, found in runs.items()}
    return first_tokens([each for one in runs["beside"] for each in one.requests]), speeds


def measure_peer(checkpoint: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The same two figures of the peer."""
    questions = questions_of("peer", arguments.size)
    with running_peer(checkpoint, arguments) as url:
        one_by_one(url, questions, 1, 4)
        return {
            "latency_s": round(one_by_one(url, questions, arguments.peer_requests, arguments.tokens), 4),
            "requests_per_s": round(at_once(url, questions, 2 * AT_ONCE, arguments.tokens), 4),
        }


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="256m", choices=[BUNDLED, *SIZES])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="compute threads of engine and peer")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--requests", type=int, default=30, help="requests for overhead and for the idle times")
    parser.add_argument("--peer-requests", type=int, default=5, help="requests alone, for comparing latencies")
    parser.add_argument("--rows", type=int, default=64, help="images of the batch job")
    parser.add_argument("--repeats", type=int, default=3, help="batch runs alone and beside requests")
    parser.add_argument("--smoke", action="store_true", help="tiny model, tiny load: shows that it runs")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.size, arguments.dtype, arguments.tokens, arguments.threads = "tiny", "float32", 16, 1
        arguments.requests, arguments.peer_requests, arguments.rows, arguments.repeats = 3, 2, 64, 1
    return arguments


def main() -> None:
    """Measure both and print the report."""
    arguments = parse()
    ray.init(
        "local", num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
    )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = prepare_checkpoint(Path(directory), arguments)
        images = Path(directory) / "images"
        images.mkdir()
        ours = measure_ours(checkpoint, images, arguments)
        ray.shutdown()
        peer = measure_peer(checkpoint, arguments)
    report = {
        "benchmark": "serve",
        "unit": f"requests/s, {AT_ONCE} at once",
        "ours": ours["requests_per_s"],
        "peer": peer["requests_per_s"],
        "ratio": round(ours["requests_per_s"] / peer["requests_per_s"], 3),
        "peer_name": "FastAPI before transformers generate",
        "details": {"ours": ours, "peer": peer},
        "setting": vars(arguments),
        "hardware": {"cpu": platform.processor() or platform.machine(), "cpus": os.cpu_count()},
        "versions": {name: version(name) for name in ("torch", "transformers", "ray")}
        | {"python": platform.python_version()},
        "command": " ".join(["python", *sys.argv]),
    }
    for name, value in ours.items():
        print(f"{name:24} {value}")
    print(f"{'peer':24} {peer}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
