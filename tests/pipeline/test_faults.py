"""What a run survives: its driver and its workers killed at any moment, and a second driver."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from driver import make_job
from noise import write_noise
from standin import PixelAnswerer, set_limit
from waiting import wait_for

from jobs.verify import verify
from pipeline.run import run

DRIVER = Path(__file__).parents[1] / "support" / "driver.py"
NUM_IMAGES = 400
pytestmark = pytest.mark.timeout(900)
UNLIMITED = 10**9
DELAY_S = 0.02
# What may be answered again after a driver's death: blocks in the engine or on the way, and rows waiting for a file.
IN_FLIGHT_ROWS = 120


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_noise(tmp_path_factory.mktemp("images"), NUM_IMAGES)
    for index in range(0, NUM_IMAGES, 20):
        (folder / f"{index:04d}.png").write_bytes(b"not an image")
    return folder


@pytest.fixture(scope="module")
def expected(
    images: Path, tiny_checkpoint: Path, ray_cluster: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Return the texts of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    run(make_job(str(images), str(output), str(tiny_checkpoint)), answerer_factory=PixelAnswerer)
    return texts(output)


class Driver:
    """A driver process and the files it works with."""

    def __init__(self, address: str, images: Path, output: Path, checkpoint: Path) -> None:
        self.output = output
        self.log = output.parent / "answers.log"
        self.limit = output.parent / "limit"
        self.allow(UNLIMITED)
        self._command = [sys.executable, str(DRIVER), address, str(images), str(output), str(checkpoint)]

    def start(self, delay_s: float = DELAY_S, prompt: str = "Describe.") -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [*self._command, str(delay_s), str(self.log), str(self.limit), prompt], stdout=subprocess.PIPE
        )

    def allow(self, answers: int) -> None:
        """Let all runs together give so many answers and then wait: none ends before it has been killed."""
        set_limit(self.limit, answers)

    def finish(self, delay_s: float = DELAY_S, prompt: str = "Describe.") -> dict[str, Any]:
        return self.outcome(self.start(delay_s, prompt))

    @staticmethod
    def outcome(process: "subprocess.Popen[bytes]") -> dict[str, Any]:
        """Wait for the driver and return what it printed; Ray prints beside it."""
        out, _ = process.communicate(timeout=500)
        answer: dict[str, Any] = json.loads(next(line for line in out.splitlines() if line.startswith(b"{")))
        return answer

    @property
    def num_answers(self) -> int:
        return self.log.stat().st_size if self.log.exists() else 0

    def has_given(self, answers: int) -> bool:
        return self.num_answers >= answers

    @property
    def num_files(self) -> int:
        return len(list((self.output / "data").glob("*.parquet")))


@pytest.fixture
def driver(ray_cluster: str, images: Path, tiny_checkpoint: Path, tmp_path: Path) -> Driver:
    return Driver(ray_cluster, images, tmp_path / "out", tiny_checkpoint)


def texts(output: Path) -> dict[str, str]:
    """Return each image's text or error code; fails on an image with two rows."""
    rows = pq.read_table(output / "data").to_pylist()
    found = {row["uri"]: row["caption"]["text"] if row["caption"] else row["error"]["code"] for row in rows}
    assert len(found) == len(rows)
    return found


def wait_while_alive(process: "subprocess.Popen[bytes]", condition: Callable[[], bool]) -> None:
    """Wait until it is so or the process has ended."""
    wait_for(lambda: condition() or process.poll() is not None, 120)


def kill_moments(driver: Driver) -> Iterator[tuple[int, Callable[[], bool]]]:
    """Yield the moments of a run at which its driver dies, by what can be seen at the destination; and how many more
    answers it may give until then."""
    output = driver.output
    yield 0, lambda: (output / "_lease").exists()
    yield 0, lambda: (output / "_job.json").exists()
    yield 0, lambda: (output / "_manifest" / "_complete.json").exists()
    yield 10, partial(driver.has_given, 1)
    for _ in range(7):
        yield 27, partial(driver.has_given, driver.num_answers + 17)
    files = driver.num_files
    yield 64, lambda: driver.num_files > files


@pytest.mark.timeout(1200)
def test_driver_killed_at_twelve_moments_then_resumed(driver: Driver, expected: dict[str, str]) -> None:
    kills = 0
    for answers, condition in kill_moments(driver):
        driver.allow(driver.num_answers + answers)
        process = driver.start()
        wait_while_alive(process, condition)
        assert process.poll() is None, "the run ended before its driver was killed"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        wait_for(lambda: not workers(), 120)  # for a moment they outlive their driver and would take the next's answers
        kills += 1
    before = driver.num_answers
    driver.allow(UNLIMITED)
    done = driver.finish(delay_s=0.0)
    assert 0 < done.pop("resumed") < NUM_IMAGES
    assert done == {"rows": NUM_IMAGES}
    assert texts(driver.output) == expected
    report = verify(str(driver.output))
    assert (report.missing, report.duplicate, report.unreadable) == (0, 0, 0)
    readable = sum(text.startswith("Describe") for text in expected.values())
    assert before <= readable + kills * IN_FLIGHT_ROWS
    assert driver.num_answers <= readable + kills * IN_FLIGHT_ROWS


def test_workers_killed_at_random(driver: Driver, expected: dict[str, str]) -> None:
    """An image that was alone in its engine at two of the deaths counts as their cause, here wrongly: the kills do not
    look whom they meet."""
    rng = random.Random(0)
    dead_engines = 0
    process = driver.start(delay_s=0.05)
    for _ in range(6):
        goal = driver.num_answers + 40
        driver.allow(goal + 10)
        wait_while_alive(process, partial(driver.has_given, goal))
        assert process.poll() is None, "the run ended before its workers were killed"
        with suppress(psutil.NoSuchProcess):  # a pool may have put it away just now
            victim = rng.choice(workers())
            dead_engines += "GenerateWorker" in "".join(victim.cmdline())
            victim.kill()
    driver.allow(UNLIMITED)
    assert driver.outcome(process) == {"rows": NUM_IMAGES, "resumed": 0}
    found = texts(driver.output)
    blamed = {uri for uri, text in found.items() if text == "engine_died"}
    assert len(blamed) <= dead_engines // 2
    assert found == expected | dict.fromkeys(blamed, "engine_died")


def workers() -> list[psutil.Process]:
    """Return the engine and prepare actors and their decoders that run under this test's Ray."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.ppid() == os.getpid():
                continue  # a decoder that another test's fixture keeps
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if any(part in line for part in ("GenerateWorker", "PrepareWorker", "decode_process")):
            found.append(process)
    return found


def test_second_driver_is_refused(driver: Driver, expected: dict[str, str]) -> None:
    driver.allow(20)
    first = driver.start()
    wait_while_alive(first, partial(driver.has_given, 1))
    second = driver.finish()
    driver.allow(UNLIMITED)
    assert second["error"] == "LeaseHeld"
    assert str(first.pid) in second["message"]
    assert driver.outcome(first)["rows"] == NUM_IMAGES
    assert texts(driver.output) == expected


def test_changed_prompt_is_refused_naming_it(driver: Driver) -> None:
    assert driver.finish(delay_s=0.0)["rows"] == NUM_IMAGES
    digest = content_digest(driver.output)
    refused = driver.finish(prompt="Transcribe.")
    assert refused["error"] == "FingerprintMismatch"
    assert "tasks.caption.prompt: 'Describe.' in the output, 'Transcribe.' now" in refused["message"]
    assert content_digest(driver.output) == digest
    assert driver.finish() == {"rows": NUM_IMAGES, "resumed": NUM_IMAGES}


def content_digest(output: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(output.rglob("*")):
        if path.is_file():
            digest.update(os.fsencode(path.relative_to(output)) + path.read_bytes())
    return digest.hexdigest()
