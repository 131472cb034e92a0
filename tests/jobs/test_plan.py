"""Plans: arithmetic against a calculator, and the command."""

import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from mixed_source import BLANK, CAPTION, job_of, profile_of
from rich.console import Console
from typer.testing import CliRunner

from jobs.cli import app
from jobs.plan import Estimate, Figures, Plan, Pool, plan, to_json
from jobs.plan_sample import Sample, SampledImage
from jobs.plan_survey import Survey
from jobs.plan_text import print_plan
from pipeline.decoder_child import Prepared
from pipeline.errors import ConfigError, RowError
from pipeline.job import EngineOptions, Job, Limits

Make = Callable[..., Plan]


class TestOutlook:
    """A source of 1,000 images, 4 tiles each, a tenth of them bad; answers of 6 tokens; half a second a tile and a
    quarter a token: 0.9 × (4 × 0.5 + 6 × 0.25) = 3.15 s of a replica an image."""

    GENERATE_S = 3.15

    @pytest.fixture
    def made(self, mixed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Make:
        good = SampledImage(90.0, Prepared(width=8, height=8, format="PNG", num_tiles=4), 500, 300)
        error = Prepared(error=RowError("truncated", "prepare", "cut"))
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


def test_nothing_is_written(mixed: Path, tiny_checkpoint: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in mixed.rglob("*")}
    job = job_of(mixed, tiny_checkpoint)
    plan(replace(job), Pool(), Figures(save_to=None), 20, lambda _: None)
    assert {path: path.stat().st_mtime_ns for path in mixed.rglob("*")} == before
    assert not Path(job.output.uri).exists()


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
