"""How long a run takes to start, measured by one on a blank picture."""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from mixed_source import job_of

from jobs.plan_start import measure_start
from pipeline.errors import ConfigError
from pipeline.job import EngineOptions, ImageOptions, Limits


def test_a_start_is_that_of_a_whole_run_and_leaves_nothing(
    mixed: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "own"))
    job = job_of(mixed, tiny_checkpoint, engine=EngineOptions(mode="shared", replicas=(4, 8), cpus=90.0))
    began = time.monotonic()
    seconds = measure_start(replace(job, limit=3, limits=Limits(finish_by="2020-01-01T00:00:00Z")))
    assert 0.5 < seconds <= time.monotonic() - began
    assert list((tmp_path / "own").iterdir()) == []
    assert not Path(job.output.uri).exists()


def test_a_job_that_fails_on_one_image_is_not_planned(mixed: Path, tiny_checkpoint: Path) -> None:
    job = replace(job_of(mixed, tiny_checkpoint), image=ImageOptions(max_bytes=1))
    with pytest.raises(ConfigError, match=r"does not run on one blank picture \(exit code 3\)"):
        measure_start(job)
