"""The endpoint on a real Ray Serve: requests, a job on the same engine, engines that die, draining."""

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pyarrow.parquet as pq
import pytest
from local_gateway import data_url
from noise import write_noise
from waiting import wait_for

from pipeline.endpoint.client import EngineStatus, EngineUnavailable
from pipeline.endpoint.options import EndpointOptions
from pipeline.errors import ConfigError
from pipeline.job import EngineOptions, ImageOptions, Job, Model, Output, Source, Task
from pipeline.run import run
from pipeline.serve import Engine, _size, build_application, engines_handle, start, stop

NUM_IMAGES = 48


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Model:
    return Model(str(tiny_checkpoint), dtype="float32")


@pytest.fixture(scope="module")
def options(model: Model) -> EndpointOptions:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return EndpointOptions(model, port=port, engine=EngineOptions(threads=1))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_noise(tmp_path_factory.mktemp("images"), NUM_IMAGES)
    (folder / "0003.png").write_bytes(b"not an image")
    return folder


@pytest.fixture
def job(images: Path, model: Model, tmp_path: Path) -> Job:
    tasks = (Task("caption", "Describe.", max_new_tokens=24), Task("mood", "Mood?", max_new_tokens=8, temperature=0.8))
    return Job(
        "shared",
        Source(str(images)),
        Output(str(tmp_path / "out"), rows_per_file=16),
        model,
        tasks,
        ImageOptions(upscale=False),
        EngineOptions(mode="shared"),
    )


def test_a_shared_job_without_an_endpoint_is_refused(job: Job, ray_cluster: str) -> None:
    with pytest.raises(ConfigError, match="no endpoint answers on this cluster; start one with `smolvlm serve`"):
        run(job)


@pytest.fixture(scope="module")
def expected(
    images: Path, model: Model, ray_cluster: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Any]]:
    """Return what a job with an engine of its own writes."""
    output = tmp_path_factory.mktemp("dedicated") / "out"
    tasks = (Task("caption", "Describe.", max_new_tokens=24), Task("mood", "Mood?", max_new_tokens=8, temperature=0.8))
    job = Job("own", Source(str(images)), Output(str(output)), model, tasks, ImageOptions(upscale=False))
    run(replace(job, engine=EngineOptions(threads=1)))
    return texts(output)


@pytest.fixture(scope="module")
def endpoint(options: EndpointOptions, expected: dict[str, list[Any]]) -> Iterator[str]:
    """Run the endpoint, after the job that needs the CPUs for itself."""
    from ray import serve

    start(options)
    yield f"http://{options.host}:{options.port}"
    serve.shutdown()


def texts(output: Path) -> dict[str, list[Any]]:
    rows = pq.read_table(output / "data").to_pylist()
    found = {
        row["uri"]: [row["error"] and row["error"]["code"], *(row[t] and row[t]["text"] for t in ("caption", "mood"))]
        for row in rows
    }
    assert len(found) == len(rows)
    return found


def statuses() -> list[EngineStatus]:
    found: list[EngineStatus] = engines_handle().broadcast("status").results(timeout_s=60)
    return found


def question(options: EndpointOptions, images: Path, index: int, **more: Any) -> dict[str, Any]:
    picture = {"type": "image_url", "image_url": {"url": data_url((images / f"{index:04d}.png").read_bytes())}}
    content = [picture, {"type": "text", "text": "Describe."}]
    return {"model": options.model_name, "messages": [{"role": "user", "content": content}], "max_tokens": 24, **more}


def answer_of(expected: dict[str, list[Any]], index: int) -> str:
    return str(next(row[1] for uri, row in expected.items() if uri.endswith(f"{index:04d}.png")))


def test_online_and_batch_say_the_same(
    endpoint: str, options: EndpointOptions, images: Path, expected: dict[str, list[Any]]
) -> None:
    with openai.OpenAI(base_url=f"{endpoint}/v1", api_key="-", max_retries=0, timeout=120) as client:
        for index in (0, 1, 2):
            done = client.chat.completions.create(**question(options, images, index))
            assert done.choices[0].message.content == answer_of(expected, index)
            stream = client.chat.completions.create(**question(options, images, index, stream=True))
            assert "".join(c.choices[0].delta.content or "" for c in stream) == answer_of(expected, index)
    assert httpx2.get(f"{endpoint}/ready", timeout=30).status_code == 200
    assert statuses()[0].actor_id in httpx2.get(f"{endpoint}/metrics", timeout=30).text


def test_a_client_that_leaves_frees_the_engine(endpoint: str, options: EndpointOptions, images: Path) -> None:
    body = question(options, images, 0, max_tokens=1900, n=4, temperature=1.5, seed=1, stream=True)
    with httpx2.stream("POST", f"{endpoint}/v1/chat/completions", json=body, timeout=60) as reply:
        next(reply.iter_lines())
        before = statuses()[0].stats["generated_tokens"]
    wait_for(lambda: statuses()[0].stats["online"]["running"] == 0, 30)
    assert statuses()[0].stats["generated_tokens"] - before < 4 * 1800


def test_a_job_shares_the_engine_that_answers_requests(
    endpoint: str, options: EndpointOptions, images: Path, job: Job, expected: dict[str, list[Any]]
) -> None:
    before = {status.actor_id: status for status in statuses()}
    done = threading.Event()

    def ask_on() -> list[str]:
        found: list[str] = []
        with openai.OpenAI(base_url=f"{endpoint}/v1", api_key="-", max_retries=0, timeout=120) as client:
            while not done.is_set() or not found:
                reply = client.chat.completions.create(**question(options, images, len(found) % 3))
                found.append(str(reply.choices[0].message.content))
        return found

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask_on)
        try:
            summary = run(job)
        finally:
            done.set()
        answers = asking.result(120)
    assert (summary.rows, summary.ok, summary.error) == (NUM_IMAGES, NUM_IMAGES - 1, 1)
    assert texts(Path(job.output.uri)) == expected
    assert answers == [answer_of(expected, number % 3) for number in range(len(answers))]
    after = {status.actor_id: status for status in statuses()}
    assert set(after) == set(before)  # the same actors as before the job
    (actor_id,) = after
    assert after[actor_id].batch_rows - before[actor_id].batch_rows == 2 * (NUM_IMAGES - 1)
    assert after[actor_id].online_requests - before[actor_id].online_requests == len(answers)


def test_a_job_for_another_model_is_refused(endpoint: str, job: Job) -> None:
    with pytest.raises(ConfigError, match=r"the endpoint serves .*float32.*, not .*bfloat16"):
        run(replace(job, model=replace(job.model, dtype="bfloat16")))


@pytest.mark.timeout(300)
def test_an_engine_killed_under_sixteen_clients(
    endpoint: str, options: EndpointOptions, images: Path, expected: dict[str, list[Any]]
) -> None:
    """Nobody hangs and nobody is told a wrong answer; soon everyone is answered again."""
    outcomes: list[tuple[float, int, str | None, int]] = []
    stopping = threading.Event()

    def ask_on(index: int) -> None:
        with httpx2.Client(timeout=100) as client:
            while not stopping.is_set():
                reply = client.post(f"{endpoint}/v1/chat/completions", json=question(options, images, index))
                text = reply.json()["choices"][0]["message"]["content"] if reply.status_code == 200 else None
                outcomes.append((time.monotonic(), reply.status_code, text, index))
                if reply.status_code == 503:
                    assert int(reply.headers["retry-after"]) >= 1
                    time.sleep(0.2)

    with ThreadPoolExecutor(16) as pool:
        clients = [pool.submit(ask_on, (0, 1, 2, 4)[number % 4]) for number in range(16)]
        wait_for(lambda: len(outcomes) >= 32, 60)
        victim = statuses()[0]
        os.kill(victim.pid, signal.SIGKILL)
        killed_at = time.monotonic()
        try:
            wait_for(lambda: any(at > killed_at + 1 and code == 200 for at, code, *_ in list(outcomes)), 120)
            recovered_at = min(at for at, code, *_ in outcomes if at > killed_at + 1 and code == 200)
            count = len(outcomes)
            wait_for(lambda: len(outcomes) >= count + 32, 60)
        finally:
            stopping.set()
        for client in clients:
            client.result(120)
    assert {code for _, code, *_ in outcomes} <= {200, 503}
    assert recovered_at - killed_at < 60
    for _, code, text, index in outcomes:
        assert code == 503 or text == answer_of(expected, index)
    assert [status.actor_id for status in statuses()] != [victim.actor_id]


@pytest.mark.timeout(300)
def test_a_job_goes_on_when_its_engine_is_killed(endpoint: str, job: Job, expected: dict[str, list[Any]]) -> None:
    victim = statuses()[0]

    def kill_at_work() -> None:
        wait_for(lambda: statuses()[0].batch_rows > victim.batch_rows, 120)
        os.kill(victim.pid, signal.SIGKILL)

    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill_at_work)
        summary = run(job)
        killing.result(1)
    assert summary.rows == NUM_IMAGES
    assert texts(Path(job.output.uri)) == expected
    assert statuses()[0].actor_id != victim.actor_id


def test_a_dead_engine_thread_fails_the_health_check(
    ray_cluster: str, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, EngineOptions(threads=1))
    asyncio.run(engine.check_health())
    monkeypatch.setattr(engine._worker._loop.engine, "step", lambda: 1 / 0)
    row = engine._worker.submit
    assert row is not None
    with pytest.raises(EngineUnavailable):
        asyncio.run(engine.answer([_row()]))
    with pytest.raises(EngineUnavailable, match="thread is dead"):
        asyncio.run(engine.check_health())


def _row() -> Any:
    from pipeline.engine_worker import Row
    from smolvlm.image import Tiles

    return Row(Tiles(np.zeros((1, 32, 32, 3), np.uint8), 0, 0), Task("t", "What?", max_new_tokens=2), 0)


@pytest.mark.timeout(200)
def test_requests_under_way_are_answered_before_the_end(endpoint: str, options: EndpointOptions, images: Path) -> None:
    """The last test of this file: it takes the endpoint away."""
    body = question(options, images, 0, max_tokens=600, temperature=1.0, seed=1, stream=True)
    with httpx2.stream("POST", f"{endpoint}/v1/chat/completions", json=body, timeout=100) as reply:
        lines = reply.iter_lines()
        next(lines)
        with ThreadPoolExecutor(1) as pool:
            stopping = pool.submit(stop)
            assert [line for line in lines if line][-1] == "data: [DONE]"
            stopping.result(100)
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{endpoint}/health", timeout=10)


@pytest.mark.parametrize(
    ("engine", "size"),
    [
        (EngineOptions(replicas=(2, 2)), {"num_replicas": 2}),
        (
            EngineOptions(replicas=(1, 8), gpus=1),
            {"autoscaling_config": {"min_replicas": 1, "max_replicas": 8, "target_ongoing_requests": 128}},
        ),
    ],
)
def test_replicas_follow_the_options(model: Model, engine: EngineOptions, size: dict[str, Any]) -> None:
    assert _size(engine) == size
    build_application(EndpointOptions(model, engine=engine))


def test_an_open_endpoint_is_not_even_built(model: Model) -> None:
    with pytest.raises(ConfigError, match="no API keys"):
        build_application(EndpointOptions(model, host="0.0.0.0"))
