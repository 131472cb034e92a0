"""The endpoint under load: overhead of the gateway, time to first token idle and beside a batch job, and a peer.

    python benchmarks/serve.py --size 256m --dtype bfloat16 [--repeats 3] [--rows 160] [--smoke]

Everything runs on one machine with random weights: `smolvlm serve`'s own application on a local Ray, its clients, and a
batch job that shares the engine (`engine: {mode: shared}`).

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
import asyncio
import base64
import http.client
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
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
sys.path[0] = str(
    Path(__file__).resolve().parent.parent
)  # this folder itself must not be searched: it has a pipeline.py

import httpx2
import numpy as np
import ray
from PIL import Image
from ray import serve

from pipeline.endpoint.client import EngineStatus
from pipeline.endpoint.options import EndpointOptions
from pipeline.job import EngineOptions, ImageOptions, Job, Model, Output, Source, Task
from pipeline.run import run
from pipeline.serve import engines_handle, start
from smolvlm.scratch import create_checkpoint

CHAT = "/v1/chat/completions"
AT_ONCE = 8
ONE_TILE = ImageOptions(splitting=False, upscale=False, timeout_s=5.0)
POLL_S = 0.1
INTERVAL_S = 1.0


@dataclass(frozen=True)
class Streamed:
    """One streamed request: seconds to the first token and in all, and its tokens."""

    first_token_s: float
    total_s: float
    tokens: int


@dataclass(frozen=True)
class Batch:
    """One run of the job: tokens a second while it was at work, and the requests answered beside it."""

    tokens_per_s: float
    requests: list[Streamed]


def photograph(seed: int, side: int = 512) -> bytes:
    """Return a JPEG with the statistics of a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((side, side))
    noisy = np.asarray(coarse, np.int16) + rng.normal(0, 6, (side, side, 1)).astype(np.int16)
    file = io.BytesIO()
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def question(model: str, seed: int, tokens: int, **more: Any) -> dict[str, Any]:
    """Return the body of a request about a picture of its own."""
    url = "data:image/jpeg;base64," + base64.b64encode(photograph(seed)).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Describe this image."}]
    return {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": tokens, **more}


def overhead_ms(url: str, model: str, count: int) -> dict[str, float]:
    """Milliseconds of a request, at the client, that were not the engine's.

    `gateway` is what the gateway itself does: all but the engine and Ray's way to it and back. `prepare` is the part of
    it before the engine has the prompt: decoding, splitting, tokens.
    """
    found: dict[str, list[float]] = {"total": [], "gateway": [], "prepare": []}
    for number in range(count + 5):
        body = json.dumps(question(model, number, 1)).encode()
        started = time.perf_counter()
        timings = ask_plainly(url, body)["smolvlm"]["timings"]
        seconds = time.perf_counter() - started
        found["total"].append(1e3 * (seconds - timings["engine_s"]))
        found["gateway"].append(1e3 * (seconds - (timings["total_s"] - timings["prepare_s"])))
        found["prepare"].append(1e3 * timings["prepare_s"])
    figures = {name: values[5:] for name, values in found.items()}  # the first ones start the decoders
    return {f"{name}_{percent}": p(percent, values) for name, values in figures.items() for percent in (50, 95)}


def ask_plainly(url: str, body: bytes) -> Any:
    """Send a request with the least that a client can do, over one connection."""
    connection = _connections.setdefault(url, http.client.HTTPConnection(url.removeprefix("http://"), timeout=300))
    connection.request("POST", CHAT, body, {"content-type": "application/json"})
    reply = connection.getresponse()
    content = json.loads(reply.read())
    assert reply.status == 200, content
    return content


_connections: dict[str, http.client.HTTPConnection] = {}


def stream(client: httpx2.Client, body: dict[str, Any]) -> Streamed:
    """Send one streaming request and take its times; a refusal raises."""
    started = time.perf_counter()
    first = 0.0
    with client.stream("POST", CHAT, json=body) as reply:
        reply.raise_for_status()
        for line in reply.iter_lines():
            event = {} if line in ("", "data: [DONE]") else json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            if not first and event.get("choices") and "role" not in event["choices"][0]["delta"]:
                first = time.perf_counter() - started
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
    return Streamed(first, time.perf_counter() - started, tokens)


def idle(url: str, model: str, count: int, tokens: int) -> list[Streamed]:
    """Streaming requests one after the other."""
    with httpx2.Client(base_url=url, timeout=300) as client:
        return [stream(client, streamed(model, 1000 + number, tokens)) for number in range(count)]


def streamed(model: str, seed: int, tokens: int) -> dict[str, Any]:
    """Return the body of a streaming request that tells its tokens."""
    return question(model, seed, tokens, stream=True, stream_options={"include_usage": True})


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


class Asking:
    """One request a second, whatever became of the ones before."""

    def __init__(self, ask: Callable[[], Streamed] | None) -> None:
        self._ask = ask
        self._threads: list[threading.Thread] = []
        self._found: list[Streamed | BaseException] = []
        self._pacing: threading.Thread | None = None

    def begin(self, may_begin: Callable[[], Any], done: threading.Event) -> None:
        def pace() -> None:
            while not may_begin() and not done.is_set():
                time.sleep(POLL_S)
            while not done.is_set() or not self._threads:
                thread = threading.Thread(target=self._one)
                self._threads.append(thread)
                thread.start()
                done.wait(INTERVAL_S)

        if self._ask is not None:
            self._pacing = threading.Thread(target=pace)
            self._pacing.start()

    def results(self) -> list[Streamed]:
        """Wait for all; one that was not answered fails the benchmark."""
        for thread in [*([self._pacing] if self._pacing else []), *self._threads]:
            thread.join()
        failed = [each for each in self._found if isinstance(each, BaseException)]
        if failed:
            raise failed[0]
        return [each for each in self._found if isinstance(each, Streamed)]

    def _one(self) -> None:
        assert self._ask is not None
        try:
            self._found.append(self._ask())
        except BaseException as error:
            self._found.append(error)


def watch(moments: list[tuple[float, int]], done: threading.Event) -> None:
    """Note the engine's token count, some times a second."""
    engines = engines_handle()
    while not done.is_set():
        statuses: list[EngineStatus] = engines.broadcast("status").results(timeout_s=60)
        moments.append((time.perf_counter(), sum(status.stats["generated_tokens"] for status in statuses)))
        time.sleep(POLL_S)


def at_once(url: str, model: str, count: int, tokens: int) -> float:
    """Requests a second with AT_ONCE of them under way."""
    bodies = [question(model, 2000 + number, tokens) for number in range(count)]

    async def everyone() -> float:
        places = asyncio.Semaphore(AT_ONCE)
        async with httpx2.AsyncClient(base_url=url, timeout=600) as client:

            async def one(body: dict[str, Any]) -> None:
                async with places:
                    (await client.post(CHAT, json=body)).raise_for_status()

            started = time.perf_counter()
            await asyncio.gather(*map(one, bodies))
            return count / (time.perf_counter() - started)

    return asyncio.run(everyone())


def one_by_one(url: str, model: str, count: int, tokens: int) -> float:
    """Median seconds of a request that is alone."""
    found = []
    with httpx2.Client(base_url=url, timeout=600) as client:
        for number in range(count):
            body = question(model, 3000 + number, tokens)
            started = time.perf_counter()
            client.post(CHAT, json=body).raise_for_status()
            found.append(time.perf_counter() - started)
    return statistics.median(found)


def serve_peer(checkpoint: str, port: int, dtype: str, threads: int) -> None:
    """The peer's process: FastAPI, a lock, and `generate`."""
    import torch
    import uvicorn
    from fastapi import FastAPI
    from transformers import Idefics3ForConditionalGeneration

    from smolvlm.image import ImagePolicy, decode_image, split_image
    from smolvlm.processor import Processor

    torch.set_num_threads(threads)
    model: Any = Idefics3ForConditionalGeneration.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()
    processor = Processor.from_pretrained(checkpoint)
    policy, lock, app = ImagePolicy(upscale=False, image_splitting=False), threading.Lock(), FastAPI()

    @app.post(CHAT)
    def chat(body: dict[str, Any]) -> dict[str, Any]:
        image, text = body["messages"][0]["content"]
        data = base64.b64decode(image["image_url"]["url"].partition(",")[2])
        tiles = split_image(decode_image(data).image, processor.config.image, policy)
        content = [{"type": "image"}, {"type": "text", "text": text["text"]}]
        ids = torch.tensor([processor.from_tiles([{"role": "user", "content": content}], [tiles]).prompt_token_ids])
        pixels = torch.from_numpy(tiles.pixels)[None].permute(0, 1, 4, 2, 3).to(model.dtype).div(255).sub(0.5).div(0.5)
        with lock, torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=pixels,
                max_new_tokens=body["max_tokens"],
                do_sample=False,
                pad_token_id=0,
            )
        return {"text": processor.decode(out[0, ids.shape[1] :].tolist())}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


@contextmanager
def running_peer(checkpoint: Path, arguments: argparse.Namespace) -> Iterator[str]:
    """Run the peer until the block ends."""
    port = free_port()
    command = [sys.executable, __file__, "--serve-peer", str(checkpoint), str(port)]
    command += ["--dtype", arguments.dtype, "--threads", str(arguments.threads)]
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


def p(percent: int, values: list[float]) -> float:
    """Return a percentile."""
    return round(float(np.percentile(values, percent)), 4)


def first_tokens(requests: list[Streamed]) -> dict[str, float]:
    """Return how long the first tokens took."""
    seconds = [each.first_token_s for each in requests]
    return {"p50": p(50, seconds), "p95": p(95, seconds), "requests": len(seconds)}


def measure_ours(checkpoint: Path, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All that concerns our endpoint; the batch job runs alone and beside requests in turns."""
    for number in range(arguments.rows):
        (folder / f"{number:05d}.jpg").write_bytes(photograph(number))
    with running_endpoint(checkpoint, arguments) as options, httpx2.Client(timeout=600) as client:
        url, model = f"http://127.0.0.1:{options.port}", options.model_name
        client.base_url = httpx2.URL(url)
        seeds = iter(range(10_000, 10_000_000))
        task = Task("caption", "Describe this image.", max_new_tokens=arguments.tokens)
        job = Job("serve", Source(str(folder)), Output(""), options.model, (task,), ONE_TILE, EngineOptions("shared"))
        overhead = overhead_ms(url, model, arguments.requests)
        alone = idle(url, model, arguments.requests, arguments.tokens)
        runs: dict[str, list[Batch]] = {"alone": [], "beside": []}
        for repeat in range(arguments.repeats):
            for name, asked in (("alone", None), ("beside", lambda: stream(client, streamed(model, next(seeds), 16)))):
                with tempfile.TemporaryDirectory() as output:
                    runs[name].append(batch(job, Path(output) / "out", asked))
                print(f"{name} {repeat + 1}: {runs[name][-1].tokens_per_s:.1f} tokens/s", flush=True)
        beside = [each for one in runs["beside"] for each in one.requests]
        speeds = {name: statistics.median(each.tokens_per_s for each in found) for name, found in runs.items()}
        return {
            "overhead_ms": overhead,
            "first_token_s": {"idle": first_tokens(alone), "saturated": first_tokens(beside)},
            "first_token_p95_ratio": round(first_tokens(beside)["p95"] / first_tokens(alone)["p95"], 2),
            "batch_tokens_per_s": {name: round(speed, 2) for name, speed in speeds.items()},
            "batch_share_kept": round(speeds["beside"] / speeds["alone"], 3),
            "answered_share": 1.0,  # a request that was not answered has ended the benchmark
            "latency_s": round(one_by_one(url, model, arguments.peer_requests, arguments.tokens), 4),
            "requests_per_s": round(at_once(url, model, 2 * AT_ONCE, arguments.tokens), 4),
        }


def measure_peer(checkpoint: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The same two figures of the peer."""
    with running_peer(checkpoint, arguments) as url:
        one_by_one(url, "peer", 1, 4)
        return {
            "latency_s": round(one_by_one(url, "peer", arguments.peer_requests, arguments.tokens), 4),
            "requests_per_s": round(at_once(url, "peer", 2 * AT_ONCE, arguments.tokens), 4),
        }


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="256m")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="compute threads of engine and peer")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--requests", type=int, default=30, help="requests for overhead and for the idle times")
    parser.add_argument("--peer-requests", type=int, default=5, help="requests alone, for comparing latencies")
    parser.add_argument("--rows", type=int, default=64, help="images of the batch job")
    parser.add_argument("--repeats", type=int, default=3, help="batch runs alone and beside requests")
    parser.add_argument("--smoke", action="store_true", help="tiny model, tiny load: shows that it runs")
    parser.add_argument("--serve-peer", nargs=2, metavar=("CHECKPOINT", "PORT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.size, arguments.dtype, arguments.tokens, arguments.threads = "tiny", "float32", 16, 1
        arguments.requests, arguments.peer_requests, arguments.rows, arguments.repeats = 3, 2, 64, 1
    return arguments


def main() -> None:
    """Measure both and print the report."""
    arguments = parse()
    if arguments.serve_peer:
        serve_peer(arguments.serve_peer[0], int(arguments.serve_peer[1]), arguments.dtype, arguments.threads)
        return
    ray.init(num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = create_checkpoint(Path(directory) / arguments.size, arguments.size, dtype=arguments.dtype)
        images = Path(directory) / "images"
        images.mkdir()
        ours = measure_ours(checkpoint, images, arguments)
        ray.shutdown()
        peer = measure_peer(checkpoint, arguments)
    setting = {name: value for name, value in vars(arguments).items() if name != "serve_peer"}
    report = {
        "benchmark": "serve",
        "unit": f"requests/s, {AT_ONCE} at once",
        "ours": ours["requests_per_s"],
        "peer": peer["requests_per_s"],
        "ratio": round(ours["requests_per_s"] / peer["requests_per_s"], 3),
        "peer_name": "FastAPI before transformers generate",
        "details": {"ours": ours, "peer": peer},
        "setting": setting,
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
