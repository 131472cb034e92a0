"""Figures of an engine: measured here, or recorded elsewhere and refused where they do not fit."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from mixed_source import BLANK, CAPTION, OCR, job_of, profile_of

from jobs import plan_profile
from jobs.plan_profile import Profile, calibrate, check_calibration, load_profile
from jobs.plan_sample import prepare_sample
from jobs.plan_survey import survey
from pipeline.errors import ConfigError
from pipeline.generate import Answer, Pending
from pipeline.job import EngineOptions, Job, Task
from smolvlm.image import Tiles


def test_the_real_engine_gives_figures(mixed: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    job = job_of(mixed, tiny_checkpoint, CAPTION, OCR)
    sample = prepare_sample(job, survey(job.source, None, 20, 0).sample, keep=8)
    made = calibrate(job, sample.tiles, start_s=7.5)
    assert made.tile_s > 0
    assert made.output_token_s >= 0
    assert made.load_s > 0
    assert made.start_s == 7.5
    assert (made.device, made.model_id) == ("cpu", str(tiny_checkpoint))
    assert made.sequences > 0
    assert [(each.prompt, each.max_new_tokens) for each in made.lengths] == [(CAPTION.prompt, 8), (OCR.prompt, 16)]
    assert all(1 <= each.mean <= each.max_new_tokens for each in made.lengths)
    made.save(tmp_path / "p.json")
    assert load_profile(tmp_path / "p.json", job, None) == made


def test_a_calm_engine_is_measured_to_its_figures(monkeypatch: pytest.MonkeyPatch, mixed: Path) -> None:
    made = calibrated(monkeypatch, job_of(mixed, mixed), noise={})
    assert made.tile_s == pytest.approx(0.05)
    assert made.output_token_s * 12 == pytest.approx(0.01 * 11)
    assert made.rounds == 3
    assert made.spread == pytest.approx(0.0, abs=1e-9)


def test_a_round_beside_other_work_does_not_count(monkeypatch: pytest.MonkeyPatch, mixed: Path) -> None:
    made = calibrated(monkeypatch, job_of(mixed, mixed), noise={5: 3.0, 6: 7.0})
    assert made.tile_s == pytest.approx(0.05)
    assert made.output_token_s * 12 == pytest.approx(0.01 * 11)
    assert made.rounds > 3


def test_noise_that_stays_is_told(monkeypatch: pytest.MonkeyPatch, mixed: Path) -> None:
    made = calibrated(monkeypatch, job_of(mixed, mixed), noise={each: 0.3 * each for each in range(3, 20)})
    assert made.rounds > 3
    assert made.spread > 0.05


def test_no_gpu_here_is_said_with_the_way_out(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.plan_profile.has_gpu", lambda: False)
    job = job_of(mixed, mixed)
    with pytest.raises(ConfigError, match=r"--gpu h100: this machine has no GPU.*--save-profile h100.json"):
        check_calibration(job, "h100")
    with pytest.raises(ConfigError, match=r"engine.gpus 1: .*--gpus 0"):
        check_calibration(replace(job, engine=EngineOptions(gpus=1)), None)
    check_calibration(job, None)


def test_a_profile_of_something_else_is_refused(mixed: Path, tmp_path: Path) -> None:
    job, path = job_of(mixed, mixed), tmp_path / "p.json"
    profile_of(job).save(path)
    assert load_profile(path, job, "h100") == profile_of(job)
    with pytest.raises(ConfigError, match="--gpu a100: the figures are of NVIDIA H100"):
        load_profile(path, job, "a100")
    with pytest.raises(ConfigError, match=r"measured with the model .*float32.*bfloat16"):
        load_profile(path, replace(job, model=replace(job.model, dtype="bfloat16")), None)
    with pytest.raises(ConfigError, match=r"measured with the model .*None.*int8"):
        load_profile(path, replace(job, model=replace(job.model, quantization="int8")), None)
    with pytest.raises(ConfigError, match=r"measured with the model .*auto.*fp8"):
        load_profile(path, replace(job, model=replace(job.model, kv_cache_dtype="fp8")), None)
    for wrong in ("", "[]", "{}", '{"lengths": [1]}', json.dumps({"lengths": [], "x": 1})):
        path.write_text(wrong)
        with pytest.raises(ConfigError, match="give a file that `smolvlm plan … --save-profile` has written"):
            load_profile(path, job, None)


class ClockedEngine:
    """An engine that moves a clock: 0.1 s for an image, 0.01 s for a token after the first; its answers have 12.

    `noise`: further seconds of the n-th time that images come after answers.
    """

    def __init__(self, noise: dict[int, float]) -> None:
        self.now = 0.0
        self._noise, self._batches, self._is_answering = noise, 0, True

    def monotonic(self) -> float:
        return self.now

    def status(self, _: str) -> SimpleNamespace:
        return SimpleNamespace(stats={"max_num_sequences": 16})

    def submit(self, tiles: Tiles, task: Task, seed: int) -> Pending:
        if self._is_answering:
            self.now += self._noise.get(self._batches, 0.0)
            self._batches, self._is_answering = self._batches + 1, False

        def wait() -> Answer:
            self._is_answering = True
            tokens = min(12, task.max_new_tokens)
            self.now += 0.1 + 0.01 * (tokens - 1)
            return Answer("", "stop", 8, tokens, 0.0)

        return wait

    def close(self) -> None:
        pass


def calibrated(monkeypatch: pytest.MonkeyPatch, job: Job, noise: dict[int, float]) -> Profile:
    engine = ClockedEngine(noise)
    monkeypatch.setattr(plan_profile, "EngineWorker", SimpleNamespace(for_job=lambda _: engine))
    monkeypatch.setattr(plan_profile, "time", engine)
    return calibrate(replace(job, tasks=(OCR,)), [BLANK], 7.5)
