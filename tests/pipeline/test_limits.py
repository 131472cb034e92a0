"""Limits: counted over all runs, stopped at cleanly, gone on from when raised."""

import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from standin import PixelAnswerer

from jobs.verify import verify
from pipeline import ranges
from pipeline.errors import ConfigError
from pipeline.job import EngineOptions, Job, Limits, Model, Output, Source, Task
from pipeline.lease import Holder, Lease, holders
from pipeline.limits import Clock, check_deadline, hourly_cost, spent, within_max_images
from pipeline.run import run
from pipeline.storage import Location

IMAGES = 120


def in_seconds(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


def job(**limits: Any) -> Job:
    base = Job("x", Source("in"), Output("out"), Model("m", "a" * 40), (Task("caption", "?"),))
    return replace(base, engine=EngineOptions(replicas=(1, 4)), limits=Limits(**limits))


def run_of(hours: float, hourly: float) -> Holder:
    return Holder("x", "h", "b", 1, 1000.0, 1000.0 + 3600 * hours, hourly)


def test_what_runs_have_cost() -> None:
    assert hourly_cost(job(max_cost=20.0, price_per_hour=2.5)) == 10
    assert hourly_cost(job()) == 0
    assert spent([run_of(2, 10), run_of(0.5, 4), run_of(100, 0)]) == pytest.approx(22)


def test_a_lease_notes_price_and_time(tmp_path: Path) -> None:
    for _ in range(2):
        with Lease(Location(str(tmp_path)), hourly_cost=3600.0):
            time.sleep(0.2)
    assert [each.released for each in holders(Location(str(tmp_path)))] == [True, True]
    assert 0.4 <= spent(holders(Location(str(tmp_path)))) < 30


def test_pending_rows_are_the_first_that_the_output_may_take() -> None:
    done, pending = ranges.of_rows([0, 1, 5]), ranges.of_rows([2, 3, 4, 6, 7])
    for most, left in {3: 0, 4: 1, 6: 3, 7: 4, 8: 5, 9: 5, 1: 0}.items():
        found = within_max_images(pending, done, Limits(max_images=most))
        assert found.tolist() == ranges.of_rows([2, 3, 4, 6, 7][:left]).tolist()
    assert within_max_images(pending, done, Limits()) is pending


def test_a_deadline_that_has_passed_is_refused_with_the_time() -> None:
    check_deadline(Limits())
    check_deadline(Limits(finish_by=in_seconds(60)))
    with pytest.raises(ConfigError, match=r"finish_by: 2020-01-01T00:00:00Z has passed, it is 20\d\d-.*set a later"):
        check_deadline(Limits(finish_by="2020-01-01T00:00:00Z"))


def test_the_clock_rings_at_the_first_limit() -> None:
    rung, later = threading.Event(), in_seconds(3600)
    with Clock(job(finish_by=in_seconds(0.4), max_cost=20.0, price_per_hour=2.5), [], rung.set) as clock:
        assert rung.wait(60)
        assert clock.reached == "finish_by"
    with Clock(job(finish_by=later, max_cost=20.0, price_per_hour=2.5), [run_of(2, 10)], rung.clear) as clock:
        assert clock.reached == "max_cost"
    for wanted in (job(), job(finish_by=later)):
        with Clock(wanted, [run_of(1, 10)], rung.set) as clock:
            assert clock.reached is None


def test_runs_stop_at_limits_and_go_on(tmp_path: Path, tiny_checkpoint: Path, ray_cluster: str) -> None:
    (tmp_path / "in").mkdir()
    for number in range(IMAGES):
        Image.new("RGB", (20 + number, 30), (number, 100, 200)).save(tmp_path / "in" / f"{number:04}.png")
    source, output = Source(str(tmp_path / "in")), Output(str(tmp_path / "out"), rows_per_file=4)
    base = Job("limits", source, output, Model(str(tiny_checkpoint)), (Task("caption", "?"),))

    def limited(delay_s: float, **limits: Any) -> tuple[int, str | None, bool]:
        wanted = replace(base, limits=Limits(**limits))
        done = run(wanted, answerer_factory=partial(PixelAnswerer, delay_s=delay_s))
        return done.rows, done.stopped_by, done.interrupted

    assert limited(0, max_images=10) == (10, "max_images", False)
    assert limited(0, max_images=10) == (10, "max_images", False)
    assert not (tmp_path / "out" / "_SUCCESS.json").exists()
    rows, reached, interrupted = limited(1.0, max_cost=3.0, price_per_hour=3600.0)
    assert (reached, interrupted) == ("max_cost", False)
    assert 10 <= rows < IMAGES
    assert limited(0, max_cost=3.0, price_per_hour=3600.0) == (rows, "max_cost", False)  # all of it is spent
    assert limited(0) == (IMAGES, None, False)
    assert verify(output.uri).passed
