"""Requests to an endpoint and what they took: one after the other, several at once, one a second."""

import asyncio
import base64
import http.client
import io
import json
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx2
import numpy as np
from PIL import Image

CHAT = "/v1/chat/completions"
AT_ONCE = 8
INTERVAL_S = 1.0
POLL_S = 0.1


@dataclass(frozen=True)
class Streamed:
    """One streamed request: seconds to the first token and in all, and its tokens."""

    first_token_s: float
    total_s: float
    tokens: int


@dataclass(frozen=True)
class Questions:
    """What is asked about pictures that are all different: of which model, with what words; `draw` makes picture N."""

    model: str
    prompt: str
    draw: Callable[[int], bytes]

    def body(self, number: int, tokens: int, **more: Any) -> dict[str, Any]:
        """Return the body of a request about picture `number`."""
        url = "data:image/jpeg;base64," + base64.b64encode(self.draw(number)).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": self.prompt}]
        return {"model": self.model, "messages": [{"role": "user", "content": content}], "max_tokens": tokens, **more}

    def streaming(self, number: int, tokens: int) -> dict[str, Any]:
        """Return the body of a streaming request that tells its tokens."""
        return self.body(number, tokens, stream=True, stream_options={"include_usage": True})


def photograph(seed: int, side: int = 512) -> bytes:
    """Return a JPEG with the statistics of a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((side, side))
    noisy = np.asarray(coarse, np.int16) + rng.normal(0, 6, (side, side, 1)).astype(np.int16)
    file = io.BytesIO()
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def overhead_ms(url: str, questions: Questions, count: int) -> dict[str, float]:
    """Milliseconds of a request, at the client, that were not the engine's.

    `gateway` is what the gateway itself does: all but the engine and Ray's way to it and back. `prepare` is the part of
    it before the engine has the prompt: decoding, splitting, tokens.
    """
    found: dict[str, list[float]] = {"total": [], "gateway": [], "prepare": []}
    for number in range(count + 5):
        body = json.dumps(questions.body(number, 1)).encode()
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


def idle(url: str, questions: Questions, count: int, tokens: int) -> list[Streamed]:
    """Streaming requests one after the other."""
    with httpx2.Client(base_url=url, timeout=300) as client:
        return [stream(client, questions.streaming(1000 + number, tokens)) for number in range(count)]


def at_once(url: str, questions: Questions, count: int, tokens: int) -> float:
    """Requests a second with AT_ONCE of them under way."""
    bodies = [questions.body(2000 + number, tokens) for number in range(count)]

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


def one_by_one(url: str, questions: Questions, count: int, tokens: int) -> float:
    """Median seconds of a request that is alone."""
    found = []
    with httpx2.Client(base_url=url, timeout=600) as client:
        for number in range(count):
            body = questions.body(3000 + number, tokens)
            started = time.perf_counter()
            client.post(CHAT, json=body).raise_for_status()
            found.append(time.perf_counter() - started)
    return statistics.median(found)


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


def p(percent: int, values: list[float]) -> float:
    """Return a percentile."""
    return round(float(np.percentile(values, percent)), 4)


def first_tokens(requests: list[Streamed]) -> dict[str, float]:
    """Return how long the first tokens took."""
    seconds = [each.first_token_s for each in requests]
    return {"p50": p(50, seconds), "p95": p(95, seconds), "requests": len(seconds)}
