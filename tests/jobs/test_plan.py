"""Plans: the survey against a count by hand, the sample against the images, arithmetic against a calculator."""

import io
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console
from tars import tar_of
from typer.testing import CliRunner

from jobs import plan_profile, plan_survey
from jobs.cli import app
from jobs.plan import Estimate, Figures, Plan, Pool, plan, to_json
from jobs.plan_profile import Profile, TaskLength, calibrate, check_calibration, load_profile
from jobs.plan_sample import Sample, SampledImage, prepare_sample
from jobs.plan_start import measure_start
from jobs.plan_survey import Survey, survey
from jobs.plan_text import print_plan
from pipeline.decoder import Prepared
from pipeline.errors import ConfigError
from pipeline.generate import Answer, Pending
from pipeline.job import EngineOptions, ImageOptions, Job, Limits, Model, Output, Source, Task
from smolvlm.config import ImageConfig
from smolvlm.image import ImagePolicy, Tiles, split_image
from smolvlm.processor import Processor

CAPTION = Task("caption", "Describe this image.", max_new_tokens=8)
OCR = Task("ocr", "Transcribe all text.", max_new_tokens=16)
ON_CPU = EngineOptions()
BLANK = Tiles(np.zeros((2, 4, 4, 3), np.uint8), 1, 1)
Make = Callable[..., Plan]


def picture(width: int, height: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    rng = np.random.default_rng(width * 10_000 + height)
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Images of two formats and many sizes, a tar, a tar with a doubled key, Parquet, and two broken files."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02}.png").write_bytes(picture(40 + number, 30))
    for number in range(10):
        (folder / f"large-{number}.jpg").write_bytes(picture(300, 200 + number, "JPEG"))
    (folder / "broken-a.jpg").write_bytes(b"no image")
    (folder / "broken-b.png").write_bytes(picture(50, 50)[:-40])
    one, other = picture(20, 20), picture(21, 20)
    (folder / "whole.tar").write_bytes(tar_of((f"{i}.png", picture(30, 20 + i)) for i in range(12)))
    (folder / "doubled.tar").write_bytes(tar_of([("a.png", one), ("b.png", other), ("a.png", one)]))
    pq.write_table(pa.table({"image": [picture(25, 25 + i) for i in range(9)]}), folder / "cells.parquet")
    return folder


def job_of(source: Path, checkpoint: Path, *tasks: Task, engine: EngineOptions = ON_CPU) -> Job:
    output = Output(str(source.parent / "out"))
    model = Model(str(checkpoint), dtype="float32")
    return Job("plan", Source(str(source)), output, model, tasks or (CAPTION,), engine=engine)


def profile_of(job: Job) -> Profile:
    return Profile(
        hardware="NVIDIA H100 80GB HBM3",
        device="cuda",
        model_id=job.model.id,
        revision=job.model.revision,
        dtype=job.model.dtype,
        quantization=job.model.quantization,
        sequences=256,
        tile_s=0.5,
        output_token_s=0.25,
        rounds=3,
        spread=0.0,
        load_s=20.0,
        start_s=36.0,
        lengths=tuple(TaskLength(task.prompt, task.max_new_tokens, 6.0, 0.5) for task in job.tasks),
        version="0",
        torch="2",
    )


class TestSurvey:
    def test_counts_are_those_of_the_files(self, mixed: Path) -> None:
        found = survey(Source(str(mixed)), None, sample=200, seed=0)
        plain = [path for path in mixed.iterdir() if path.suffix in (".png", ".jpg")]
        assert found.images == len(plain) + 12 + 3 + 9
        assert found.listed_errors == {"duplicate_key": 1}
        assert found.sized == len(plain) + 12 + 2  # Parquet tells no sizes of cells
        members = sum(len(picture(30, 20 + i)) for i in range(12)) + len(picture(20, 20)) + len(picture(21, 20))
        assert found.known_bytes == sum(path.stat().st_size for path in plain) + members

    def test_a_sample_as_large_as_the_source_is_the_source(self, mixed: Path) -> None:
        found = survey(Source(str(mixed)), None, sample=1000, seed=0)
        assert len(found.sample) == found.images - found.listed_errors.total()
        assert {item.weight for item in found.sample} == {1.0}
        names = Counter((item.ref.uri, item.ref.member) for item in found.sample)
        assert set(names.values()) == {1}

    def test_a_small_sample_has_some_of_every_kind_and_stands_for_all(self, mixed: Path) -> None:
        found = survey(Source(str(mixed)), None, sample=16, seed=3)
        kinds = {(item.ref.kind, Path(item.ref.uri).suffix) for item in found.sample}
        assert kinds == {("object", ".png"), ("object", ".jpg"), ("tar", ".tar"), ("parquet", ".parquet")}
        assert sum(item.weight for item in found.sample) == pytest.approx(found.images - 1)
        assert len(found.sample) < 30

    def test_the_same_seed_draws_the_same_and_another_draws_others(self, mixed: Path) -> None:
        first, again, other = (survey(Source(str(mixed)), None, 16, seed).sample for seed in (1, 1, 2))
        assert first == again
        assert first != other

    def test_a_limit_is_that_of_a_run(self, mixed: Path) -> None:
        found = survey(Source(str(mixed)), 7, sample=200, seed=0)
        assert found.images == 7
        assert len(found.sample) == 7

    def test_every_image_is_as_likely_as_its_neighbours(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """100,000 rows in ten tables of one stratum: the mean place of the drawn ones is the middle."""
        columns = {"uri": [f"s3://b/{i:06}.jpg" for i in range(10_000)], "size": [1000] * 10_000}
        table = pa.table(
            {
                **columns,
                "member": pa.nulls(10_000, pa.string()),
                "kind": ["object"] * 10_000,
                "etag": ["e"] * 10_000,
                "offset": pa.nulls(10_000, pa.int64()),
                "error_code": pa.nulls(10_000, pa.string()),
                "error_message": pa.nulls(10_000, pa.string()),
            }
        )
        monkeypatch.setattr(plan_survey, "manifest_tables", lambda source, expand: iter([table] * 10))
        found = survey(Source("s3://b/"), None, sample=400, seed=0)
        places = np.array([item.ref.row for item in found.sample])
        assert (found.images, found.known_bytes, len(places)) == (100_000, 100_000_000, 400)
        assert abs(places.mean() - 50_000) < 3 * 100_000 / np.sqrt(12 * 400)
        assert {item.weight for item in found.sample} == {250.0}


class TestSample:
    def test_tiles_tokens_and_errors_are_those_of_the_images(self, mixed: Path, tiny_checkpoint: Path) -> None:
        job = job_of(mixed, tiny_checkpoint, CAPTION, OCR)
        sample = prepare_sample(job, survey(job.source, None, 1000, 0).sample, keep=4)
        processor = Processor.from_pretrained(tiny_checkpoint)
        config = ImageConfig.from_pretrained(tiny_checkpoint)
        good = [image for image in sample.images if image.error is None]
        for image in good:
            size = (image.prepared.width or 0, image.prepared.height or 0)
            tiles = split_image(Image.new("RGB", size), config, ImagePolicy())
            assert image.prepared.num_tiles == len(tiles.pixels)
            wanted = [messages(task) for task in job.tasks]
            tokens = sum(len(processor.from_tiles(each, [tiles]).prompt_token_ids) for each in wanted)
            assert image.prompt_tokens == tokens
        bad = Counter(image.error.code for image in sample.images if image.error is not None)
        assert bad == {"not_an_image": 1, "truncated": 1}
        assert len(good) == 40 + 10 + 12 + 2 + 9
        assert 0 < len(sample.tiles) <= 4
        assert sample.prepare_cpu_s > 0

    def test_nothing_is_written(self, mixed: Path, tiny_checkpoint: Path) -> None:
        before = {path: path.stat().st_mtime_ns for path in mixed.rglob("*")}
        job = job_of(mixed, tiny_checkpoint)
        plan(replace(job), Pool(), Figures(save_to=None), 20, lambda _: None)
        assert {path: path.stat().st_mtime_ns for path in mixed.rglob("*")} == before
        assert not Path(job.output.uri).exists()


def messages(task: Task) -> list[dict[str, object]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": task.prompt}]}]


class TestCalibration:
    def test_the_real_engine_gives_figures(self, mixed: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
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

    def test_a_calm_engine_is_measured_to_its_figures(self, monkeypatch: pytest.MonkeyPatch, mixed: Path) -> None:
        made = calibrated(monkeypatch, job_of(mixed, mixed), noise={})
        assert made.tile_s == pytest.approx(0.05)
        assert made.output_token_s * 12 == pytest.approx(0.01 * 11)
        assert made.rounds == 3
        assert made.spread == pytest.approx(0.0, abs=1e-9)

    def test_a_round_beside_other_work_does_not_count(self, monkeypatch: pytest.MonkeyPatch, mixed: Path) -> None:
        made = calibrated(monkeypatch, job_of(mixed, mixed), noise={5: 3.0, 6: 7.0})
        assert made.tile_s == pytest.approx(0.05)
        assert made.output_token_s * 12 == pytest.approx(0.01 * 11)
        assert made.rounds > 3

    def test_noise_that_stays_is_told(self, monkeypatch: pytest.MonkeyPatch, mixed: Path) -> None:
        made = calibrated(monkeypatch, job_of(mixed, mixed), noise={each: 0.3 * each for each in range(3, 20)})
        assert made.rounds > 3
        assert made.spread > 0.05

    def test_a_start_is_that_of_a_whole_run_and_leaves_nothing(
        self, mixed: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "own").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "own"))
        job = job_of(mixed, tiny_checkpoint, engine=EngineOptions(mode="shared", replicas=(4, 8), cpus=90.0))
        began = time.monotonic()
        seconds = measure_start(replace(job, limit=3, limits=Limits(finish_by="2020-01-01T00:00:00Z")))
        assert 0.5 < seconds <= time.monotonic() - began
        assert list((tmp_path / "own").iterdir()) == []
        assert not Path(job.output.uri).exists()

    def test_a_job_that_fails_on_one_image_is_not_planned(self, mixed: Path, tiny_checkpoint: Path) -> None:
        job = replace(job_of(mixed, tiny_checkpoint), image=ImageOptions(max_bytes=1))
        with pytest.raises(ConfigError, match=r"does not run on one blank picture \(exit code 3\)"):
            measure_start(job)

    def test_no_gpu_here_is_said_with_the_way_out(self, mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("jobs.plan_profile.has_gpu", lambda: False)
        job = job_of(mixed, mixed)
        with pytest.raises(ConfigError, match=r"--gpu h100: this machine has no GPU.*--save-profile h100.json"):
            check_calibration(job, "h100")
        with pytest.raises(ConfigError, match=r"engine.gpus 1: .*--gpus 0"):
            check_calibration(replace(job, engine=EngineOptions(gpus=1)), None)
        check_calibration(job, None)

    def test_a_profile_of_something_else_is_refused(self, mixed: Path, tmp_path: Path) -> None:
        job, path = job_of(mixed, mixed), tmp_path / "p.json"
        profile_of(job).save(path)
        assert load_profile(path, job, "h100") == profile_of(job)
        with pytest.raises(ConfigError, match="--gpu a100: the figures are of NVIDIA H100"):
            load_profile(path, job, "a100")
        with pytest.raises(ConfigError, match=r"measured with the model .*float32.*bfloat16"):
            load_profile(path, replace(job, model=replace(job.model, dtype="bfloat16")), None)
        with pytest.raises(ConfigError, match=r"measured with the model .*None.*int8"):
            load_profile(path, replace(job, model=replace(job.model, quantization="int8")), None)
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


class TestOutlook:
    """A source of 1,000 images, 4 tiles each, a tenth of them bad; answers of 6 tokens; half a second a tile and a
    quarter a token: 0.9 × (4 × 0.5 + 6 × 0.25) = 3.15 s of a replica an image."""

    GENERATE_S = 3.15

    @pytest.fixture
    def made(self, mixed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Make:
        good = SampledImage(90.0, Prepared(width=8, height=8, format="PNG", num_tiles=4), 500, 300)
        error = prepared_error()
        images = (*[good] * 10, SampledImage(100.0, error, 500, 0))
        sample = Sample(images, (BLANK,), fetch_s=0.1, prepare_cpu_s=0.2)
        found = Survey(1000, 1000, 500_000, Counter(), ())
        monkeypatch.setattr("jobs.plan.survey", lambda *_: found)
        monkeypatch.setattr("jobs.plan.prepare_sample", lambda *_: sample)
        job = job_of(mixed, mixed, engine=EngineOptions(gpus=1, replicas=(1, 8)))
        profile_of(job).save(tmp_path / "p.json")

        def make(pool: Pool, job: Job = job, output_tokens: float | None = None) -> Plan:
            return plan(job, pool, Figures(tmp_path / "p.json", None, output_tokens), 200, lambda _: None)

        return make

    def test_replicas_add_up_and_cost_money(self, made: Make) -> None:
        content = to_json(made(Pool("h100", 8, None, 2.5)))
        assert content["images_per_second"] == pytest.approx(8 / self.GENERATE_S)
        assert content["hours"] == pytest.approx((36 + 1000 * self.GENERATE_S / 8) / 3600)
        assert content["cost"] == pytest.approx(content["hours"] * 8 * 2.5)
        assert content["cpus_per_replica"] == pytest.approx(0.2 / self.GENERATE_S)
        assert (content["bottleneck"], content["bad_share"]) == ("generate", 0.1)
        assert (content["images"], content["bytes"], content["errors_by_code"]) == (1000, 500_000, {"truncated": 100})
        low, high = content["hours_interval"]
        assert low < content["hours"] < high
        assert content["cost_interval"] == pytest.approx([low * 20, high * 20])

    def test_few_cores_make_preparation_the_bottleneck(self, made: Make) -> None:
        content = to_json(made(Pool("h100", 256, 4)))
        assert (content["bottleneck"], content["images_per_second"]) == ("prepare", pytest.approx(4 / 0.2))
        assert content["cost"] is None

    def test_the_jobs_own_price_and_replicas_are_taken(self, made: Make, mixed: Path) -> None:
        job = job_of(mixed, mixed, engine=EngineOptions(gpus=1, replicas=(1, 2)))
        job = replace(job, limits=Limits(max_cost=9.0, price_per_hour=3.0))
        content = to_json(made(Pool(), job))
        assert content["replicas"] == 2
        assert content["cost"] == pytest.approx(content["hours"] * 2 * 3)

    def test_a_task_that_was_not_measured_needs_a_length(self, made: Make, mixed: Path) -> None:
        job = replace(job_of(mixed, mixed, replace(CAPTION, max_new_tokens=9)), engine=EngineOptions(gpus=1))
        with pytest.raises(ConfigError, match=r"task caption: .*--output-tokens"):
            made(Pool(), job)
        assert made(Pool(), job, output_tokens=40.0).output_tokens == Estimate(40.0)

    def test_a_person_sees_all_of_it(self, made: Make) -> None:
        shown = io.StringIO()
        print_plan(made(Pool("h100", 8, None, 2.5)), Console(file=shown, width=100))
        text = shown.getvalue()
        for part in ("1,000 (0.0005 GB)", "PNG 100%", "10.00% (truncated 100)", "tiles per image: 4.0", "█ 100.0%"):
            assert part in text
        assert "8 × NVIDIA H100 80GB HBM3" in text
        assert "the engines; 0.063 CPU cores of preparation keep one engine busy (as many are assumed)" in text
        assert "warning" not in text

    def test_figures_that_may_be_worth_little_come_with_a_warning(
        self, made: Make, mixed: Path, tmp_path: Path
    ) -> None:
        job = job_of(mixed, mixed, engine=EngineOptions(gpus=1, replicas=(1, 8)))
        replace(profile_of(job), spread=0.2, output_token_s=0.0).save(tmp_path / "p.json")
        shown = io.StringIO()
        found = made(Pool())
        print_plan(found, Console(file=shown, width=200))
        noisy, short = to_json(found)["warnings"]
        assert "3 rounds leave ±40%" in noisy
        assert "their length counts for nothing" in short
        for warning in (noisy, short):
            assert warning[:60] in shown.getvalue()


def prepared_error() -> Prepared:
    from pipeline.errors import RowError

    return Prepared(error=RowError("truncated", "prepare", "cut"))


def test_on_the_command_line(mixed: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    content = {
        "name": "plan",
        "source": {"uri": str(mixed)},
        "output": {"uri": str(tmp_path / "out")},
        "model": {"id": str(tiny_checkpoint), "dtype": "float32"},
        "tasks": [{"name": "caption", "prompt": "What is this?", "max_new_tokens": 4}],
    }
    (tmp_path / "job.json").write_text(json.dumps(content))
    arguments = [
        "plan",
        str(tmp_path / "job.json"),
        "--json",
        "--price",
        "1",
        "--save-profile",
        str(tmp_path / "p.json"),
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    printed = json.loads(done.stdout)
    assert {"images": 76, "bottleneck": "generate"}.items() <= printed.items()
    assert printed["bad_share"] == pytest.approx(3 / 76)
    assert printed["cost"] == pytest.approx(printed["hours"])
    for key in ("bytes", "tiles_per_image", "prompt_tokens_per_image", "images_per_second", "hours"):
        assert printed[key] > 0

    again = CliRunner().invoke(app, [*arguments, "--profile", str(tmp_path / "p.json")])
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["seconds_per_tile"] == printed["seconds_per_tile"]

    (mixed / "only").mkdir()
    (mixed / "only" / "bad.png").write_bytes(b"x")
    for source, said in ((mixed / "none", "none"), (mixed / "only", "no image of the sample is good (not_an_image)")):
        (tmp_path / "job.json").write_text(json.dumps({**content, "source": {"uri": str(source)}}))
        refused = CliRunner().invoke(app, ["plan", str(tmp_path / "job.json")])
        assert refused.exit_code == 2
        assert said in refused.stderr
