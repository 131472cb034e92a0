"""`smolvlm train` as a user runs it, and what it shows meanwhile."""

import io
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import yaml
from console_script import SMOLVLM, smolvlm
from PIL import Image
from rich.console import Console
from rich.progress import Progress as Bar

from jobs.train import STOPPING, Summary, summary_object, summary_text
from jobs.training_file import parse
from jobs.training_progress import BarDisplay, LineDisplay, Meter, State, _columns, display
from smolvlm.training.loop import StepReport
from smolvlm.training.plan import TrainingPlan
from smolvlm.training.probe import Score

WORDS = {
    "kinds": {"word": 1},
    "longest_edge": [64, 64],
    "text_px": [12, 32],
    "reference_edge": 128,
    "max_chars": 6,
    "max_lines": 1,
    "degraded_share": 0,
}
STAGE = {"name": "glyphs", "steps": 3, "batch_size": 4, "learning_rate": [0.001, 0.001], "documents": WORDS}


def content(**changes: Any) -> dict[str, Any]:
    shape = yaml.safe_load("""
        vision: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2, image_size: 64,
                 patch_size: 8}
        text: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,
               num_key_value_heads: 1, head_dim: 16, max_position_embeddings: 128, rope_theta: 10000.0, vocab_size: 402}
        scale_factor: 2
        longest_edge: 64
    """)
    stages = [{**STAGE, "losses": {"text": 0, "glyph": 1}}, {**STAGE, "name": "words", "steps": 5}]
    base = {"name": "words", "start": {"shape": shape}, "stages": stages, "precision": "float32", "threads": 1}
    return {**base, "output": "/nowhere", "data_workers": 0, **changes}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(content(**changes)))
    return path


def test_a_training_from_its_file_to_its_curves(tmp_path: Path) -> None:
    evaluation = {"every_steps": 4, "count": 2, "max_new_tokens": 4, "documents": WORDS}
    file, output = write(tmp_path, evaluation=evaluation), tmp_path / "run"
    done = smolvlm("train", file, "--output", output, "--json")
    assert done.returncode == 0, done.stderr
    (summary,) = map(json.loads, done.stdout.splitlines())
    assert (summary["steps"], summary["total_steps"], summary["interrupted"]) == (8, 8, False)
    assert summary["model"] == str(output / "model")
    states = [json.loads(line) for line in done.stderr.splitlines()]
    assert [each["event"] for each in states] == ["progress"] * len(states)
    assert [each["step"] for each in states if each["score"] is not None] == [4, 8]
    assert states[-1]["losses"].keys() == {"text"}
    assert (output / "model" / "model.safetensors").is_file()
    logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "losses" in line] == list(range(1, 9))
    with Image.open(output / "loss.png") as plot:
        assert plot.format == "PNG"
        assert plot.convert("L").getextrema() == (0, 255)


def start(file: Path, output: Path) -> subprocess.Popen[str]:
    """In a process group of its own, which gets Ctrl-C as a whole, as at a terminal."""
    return subprocess.Popen(
        [SMOLVLM, "train", file, "-o", output],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def until(stream: IO[str] | None, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    assert stream is not None
    for line in stream:
        found: dict[str, Any] = json.loads(line)
        if wanted(found):
            return found
    raise AssertionError("the stream ended before")


def test_ctrl_c_saves_and_the_next_run_goes_on(tmp_path: Path) -> None:
    """Data workers get the signal too, and must not leave the step without its data."""
    endless = {**STAGE, "steps": 100_000}
    file, output = write(tmp_path, stages=[endless], data_workers=1), tmp_path / "run"
    with start(file, output) as process:
        until(process.stdout, lambda line: line["event"] == "progress")
        os.killpg(process.pid, signal.SIGINT)
        told, complained = process.communicate(timeout=100)
    assert (process.returncode, complained) == (130, "")
    message, summary = map(json.loads, told.splitlines()[-2:])
    assert message == {"event": "message", "message": STOPPING}
    assert (summary["interrupted"], summary["model"]) == (True, None)
    (checkpoint,) = (output / "checkpoints").glob("step_*")
    stopped_at = int(checkpoint.name.removeprefix("step_"))
    assert stopped_at == summary["steps"] == summary["state"]["step"]
    assert (output / "loss.png").is_file()

    longer = write(
        tmp_path, stages=[endless, {**STAGE, "name": "more"}], data_workers=1
    )  # a stage to come may be added
    with start(longer, output) as again:
        first = until(again.stdout, lambda line: line["event"] == "progress")
        os.killpg(again.pid, signal.SIGINT)
        again.communicate(timeout=100)
    assert (first["step"], again.returncode) == (stopped_at + 1, 130)


def test_a_mistake_is_told_without_a_traceback(tmp_path: Path) -> None:
    done = smolvlm("train", write(tmp_path, stages=[{**STAGE, "batch_size": 3, "micro_batches": 2}]), "-o", tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"error: {tmp_path / 'train.yaml'}: `stages[0].batch_size`: 3: choose a multiple of processes × micro_batches, "
        "which is 1 × 2\n"
    )


def test_a_diverged_training_ends_with_one(tmp_path: Path) -> None:
    wild = {**STAGE, "steps": 50, "learning_rate": [1e30, 1e30]}
    done = smolvlm("train", write(tmp_path, stages=[wild]), "-o", tmp_path / "run")
    assert done.returncode == 1
    assert "of stage 'glyphs'" in done.stderr
    assert "Lower learning_rate" in done.stderr
    assert "Traceback" not in done.stderr


def report(step: int, stage: str = "words", **losses: float) -> StepReport:
    return StepReport(step, stage, losses or {"text": 2.0}, 1e-3, 1.0, 4, 400, 0.1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the display sees, in seconds."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def plan() -> TrainingPlan:
    return parse(content())


def test_the_meter_averages_and_says_how_long_it_takes(plan: TrainingPlan, clock: list[float]) -> None:
    meter = Meter(plan)
    first = meter(report(4, text=3.0), None)
    assert (first.samples_per_s, first.eta_s, first.losses) == (None, None, {"text": 3.0})
    clock[0] = 2.0
    second = meter(report(5, text=1.0), Score(0.5, 0.75, 0.25, 9.0))
    assert second.losses == {"text": 2.0}
    assert second.samples_per_s == 2.0
    assert second.eta_s == 3 * 4 / 2.0  # three steps of four examples
    assert second.score == {"cer": 0.5, "wer": 0.75, "exact": 0.25, "seconds": 9.0}
    assert meter(report(6), None).score == second.score


def test_the_meter_begins_anew_with_a_stage(plan: TrainingPlan, clock: list[float]) -> None:
    meter = Meter(plan)
    meter(report(3, "glyphs", glyph=9.0), None)
    state = meter(report(4, "words", text=2.0), None)
    assert (state.stage, state.losses, state.samples_per_s) == ("words", {"text": 2.0}, None)


def state(step: int = 3, **changes: Any) -> State:
    values: dict[str, Any] = {
        "step": step,
        "total_steps": 8,
        "stage": "words",
        "losses": {"text": 1.2345, "glyph": 0.5},
        "learning_rate": 0.002,
        "samples_per_s": 12.34,
        "eta_s": 75.4,
        "score": {"cer": 0.125, "wer": 0.5, "exact": 0.25, "seconds": 1.0},
    }
    return State(**{**values, **changes})


def test_lines_come_every_five_seconds_with_a_score_and_at_the_end(clock: list[float]) -> None:
    stream = io.StringIO()
    lines = LineDisplay(stream)
    for step, seconds, score in (
        (1, 0, None),
        (2, 1, None),
        (3, 6, None),
        (4, 7, {"cer": 1.0}),
        (7, 8, None),
        (8, 8, None),
    ):
        clock[0] = seconds
        lines(state(step, score=score))
    assert [json.loads(line)["step"] for line in stream.getvalue().splitlines()] == [1, 3, 4, 7, 8]


def test_a_terminal_gets_a_live_line() -> None:
    stream = io.StringIO()
    with Bar(*_columns(), console=Console(file=stream, force_terminal=True, width=160, color_system=None)) as bar:
        shown = BarDisplay(bar)
        shown(state())
        shown.say("stopping")
    text = stream.getvalue()
    for part in (
        "words",
        "3/8",
        "text 1.234",
        "glyph 0.500",
        "rate 0.002",
        "12.3 samples/s",
        "CER 12.5%",
        "1 min 15 s",
    ):
        assert part in text, part
    assert "stopping" in text


def test_a_stream_that_is_no_terminal_gets_lines() -> None:
    stream = io.StringIO()
    with display(stream) as shown:
        shown.say("hello")
    assert json.loads(stream.getvalue()) == {"event": "message", "message": "hello"}


def test_the_last_words() -> None:
    done = Summary("/runs/a/model", "/runs/a/loss.png", "/runs/a", False, 8, 8, 3700.0, state())
    assert summary_text(done).splitlines() == [
        "finished: 8 steps of 8 in 1 h 01 min",
        "losses: text 1.2345, glyph 0.5000",
        "last score: CER 12.5%, WER 50.0%, exact 25.0%",
        "model: /runs/a/model",
        "curves: /runs/a/loss.png",
        "output: /runs/a",
    ]
    assert summary_object(done)["event"] == "summary"
    stopped = Summary(None, "/runs/a/loss.png", "/runs/a", True, 3, 8, 2.0, None)
    assert summary_text(stopped).startswith("stopped early; run the same command again to go on: 3 steps of 8 in 2 s\n")
