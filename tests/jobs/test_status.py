"""`smolvlm status` from what stands in the destination, at every stage of a job's life."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished import begin, commit, finish, make_job, row
from typer.testing import CliRunner

from jobs.cli import app
from jobs.status import Status, images_per_s, shards_done, status
from pipeline import ranges
from pipeline.claim import claim
from pipeline.commit import Commit
from pipeline.errors import ConfigError
from pipeline.lease import Holder, Lease
from pipeline.manifest import ROWS_PER_SHARD, Manifest
from pipeline.storage import Location

INPUTS = 2 * ROWS_PER_SHARD + 100
URIS = [f"u{n}" for n in range(INPUTS)]


@pytest.fixture(params=["file", "s3"])
def destination(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    if request.param == "file":
        return Location(str(tmp_path))
    return Location(f"s3://test/status-{time.monotonic_ns()}", request.getfixturevalue("s3"))


def put_rows(destination: Location, numbers: range, at: float, errors: tuple[int, ...] = ()) -> None:
    rows = [row(n, URIS[n], "empty" if n in errors else None) for n in numbers]
    commit(destination, rows, **{"smolvlm.committed_at": f"{at:.3f}"})


def test_from_claim_to_success(destination: Location) -> None:
    def look() -> Status:
        return status(destination.uri, destination.endpoint_url)

    with pytest.raises(ConfigError, match=r"no _job\.json"):
        look()
    with Lease(destination):
        claim(destination, make_job(destination))
        assert (look().state, look().inputs, look().rows, look().shards) == ("listing", None, 0, None)
        begin(destination, URIS)
        began = time.time()
        for n in range(3):
            put_rows(destination, range(n * 500, (n + 1) * 500), began + 10 * n + 1, (7, 501))
        found = look()
        assert (found.state, found.name, found.inputs) == ("running", "photos", INPUTS)
        assert (found.rows, found.ok, found.error, found.errors_by_code) == (1500, 1498, 2, {"empty": 2})
        assert (found.shards, found.shards_done) == (3, 1)
        assert found.images_per_s == pytest.approx(50)
        assert found.eta_s == pytest.approx((INPUTS - 1500) / 50)
        assert found.driver is not None
        assert (found.driver.host, found.driver.pid) == (socket.gethostname(), os.getpid())
        assert f"process {os.getpid()}" in found.to_text()
    stopped = look()
    assert (stopped.state, stopped.driver, stopped.eta_s) == ("stopped", None, None)
    assert "run the same job again" in stopped.to_text()
    put_rows(destination, range(1500, INPUTS), began + 40)
    assert look().state == "stopped"
    finish(destination, INPUTS)
    assert (look().state, look().shards_done, look().rows) == ("finished", 3, INPUTS)


def test_shards() -> None:
    manifest = Manifest(2150, 1000, ())
    cases = {((0, 2150),): 3, ((0, 2149),): 2, ((1, 2150),): 2, ((0, 999),): 0, ((500, 2000), (2000, 2150)): 2, (): 0}
    for rows, done in cases.items():
        assert shards_done(ranges.union(np.array(rows, np.int64).reshape(-1, 2)), manifest) == done, rows


def test_the_rate_is_that_of_the_last_run_that_wrote() -> None:
    def at(moment: float) -> Commit:
        return Commit(f"{moment}", ranges.of_rows(np.arange(20)), moment)

    def run(moment: float) -> Holder:
        return Holder("x", "h", "b", 1, moment, moment + 5)

    assert images_per_s([], []) is None
    assert images_per_s([at(10)], [run(0)]) is None
    assert images_per_s([at(10), at(14)], [run(0)]) == 5
    assert images_per_s([at(10), at(14), at(1000), at(1001)], [run(0), run(900), run(2000)]) == 20


def test_the_command(tmp_path: Path) -> None:
    begin(Location(str(tmp_path)), URIS[:10])
    put_rows(Location(str(tmp_path)), range(10), time.time(), (3,))
    finish(Location(str(tmp_path)), 10)
    done = CliRunner().invoke(app, ["status", str(tmp_path), "--json"])
    assert done.exit_code == 0
    content: dict[str, Any] = json.loads(done.stdout)
    wanted = {"state": "finished", "rows": 10, "ok": 9, "error": 1, "errors_by_code": {"empty": 1}, "driver": None}
    assert wanted.items() <= content.items()
    watched = CliRunner().invoke(app, ["status", str(tmp_path), "--watch"])
    assert (watched.exit_code, watched.stdout.splitlines()[0]) == (0, "photos: finished")
    assert CliRunner().invoke(app, ["status", str(tmp_path), "--watch", "--json"]).exit_code == 2
    assert CliRunner().invoke(app, ["status", str(tmp_path / "none")]).exit_code == 2
