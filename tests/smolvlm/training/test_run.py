import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from fixture_types import MakePlan
from safetensors.torch import load_file
from torch import Tensor
from word_pictures import WordPictures

from smolvlm.scratch import SIZES, Shape, TextShape, VisionShape
from smolvlm.training.checkpoint import PlanChanged, latest_checkpoint, load_state
from smolvlm.training.documents import DocumentOptions
from smolvlm.training.examples import Labelled
from smolvlm.training.fresh import NUM_TOKENS
from smolvlm.training.loop import StepReport, TrainingDiverged
from smolvlm.training.plan import Evaluation, LabelledData, Losses, Optimizer, Stage, Start, TrainingPlan
from smolvlm.training.probe import Score
from smolvlm.training.run import Data, SourceData, read_metrics, run_training

ROWS = SourceData(WordPictures(), 20)
ON_ROWS = Data(ROWS)
WORDS = DocumentOptions({"word": 1}, (64, 64), (12, 32), 128, degraded_share=0, max_chars=6, max_lines=1)
FIRST = Stage("first", 11, 4, (1e-3, 5e-4), 3, losses=Losses(0.5, 1, 0.5), documents=WORDS)
SECOND = Stage("second", 3, 4, (1e-3, 1e-4), micro_batches=2, freeze=("connector",))
OPTIMIZERS = [Optimizer("muon"), Optimizer("adamw"), Optimizer("adamw8bit")]
RunPlan = Callable[..., TrainingPlan]


@pytest.fixture
def run_of(plan_of: MakePlan, tmp_path: Path) -> RunPlan:
    """Two stages: drawn documents, ending in the middle of a window, then a source. `folder` names the output."""

    def make(folder: str = "run", **changes: Any) -> TrainingPlan:
        settings = {"source": LabelledData("by hand"), "stages": (FIRST, SECOND), "output": str(tmp_path / folder)}
        return plan_of(**settings | changes)

    return make


def train(plan: TrainingPlan, steps: int = 10**9, data: Data = ON_ROWS) -> Path | None:
    """Run a plan, asking it to stop after `steps`; the question comes once a step."""
    made = count(1)
    return run_training(plan, data, is_stopping=lambda: next(made) >= steps)


def tensors(content: Any, path: str = "") -> dict[str, Tensor]:
    """Every tensor in a nested state by its path."""
    if isinstance(content, Tensor):
        return {path: content}
    parts = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return {name: tensor for key, part in parts for name, tensor in tensors(part, f"{path}/{key}").items()}


def assert_same_run(ours: TrainingPlan, theirs: TrainingPlan) -> None:
    """Weights, optimizer state and metrics are the same to the last bit."""
    one, other = (latest_checkpoint(Path(plan.output)) for plan in (ours, theirs))
    assert one is not None
    assert other is not None
    assert one.name == other.name
    weights = [load_file(folder / "model.safetensors") for folder in (one, other)]
    states = [tensors(load_state(folder)) for folder in (one, other)]
    for mine, its in (weights, states):
        torch.testing.assert_close(mine, its, atol=0, rtol=0)
    assert timeless(ours) == timeless(theirs)


def timeless(plan: TrainingPlan) -> list[dict[str, Any]]:
    lines = read_metrics(Path(plan.output))
    for line in lines:
        for holder in (line, line.get("score", {})):
            for key in ("time", "seconds"):
                holder.pop(key, None)
    return lines


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda each: each.kind)
def test_a_resumed_run_is_an_uninterrupted_one(run_of: RunPlan, optimizer: Optimizer) -> None:
    """Stopped in the middle of a window, at a stage's last step, and one step before the end."""
    whole, parts = run_of("whole", optimizer=optimizer), run_of("parts", optimizer=optimizer)
    assert train(whole) == Path(whole.output) / "model"
    assert [train(parts, steps) for steps in (5, 6, 2)] == [None] * 3
    assert latest_checkpoint(Path(parts.output)) == Path(parts.output) / "checkpoints" / "step_00000013"
    assert train(parts) == Path(parts.output) / "model"
    assert_same_run(parts, whole)
    models = [load_file(Path(plan.output) / "model" / "model.safetensors") for plan in (parts, whole)]
    torch.testing.assert_close(*models, atol=0, rtol=0)


def test_a_killed_run_goes_on_from_its_last_checkpoint(run_of: RunPlan) -> None:
    """Steps made after the checkpoint are made again, and a half-written line of the log is forgotten."""
    whole, killed = run_of("whole"), run_of("killed", checkpoint_every=2)
    train(whole)

    def die(report: StepReport, score: Score | None) -> None:
        if report.step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(killed, ON_ROWS, on_step=die)
    log = Path(killed.output) / "metrics.jsonl"
    assert [line["step"] for line in read_metrics(log.parent)] == [1, 2, 3, 4, 5, 6, 7]
    log.write_text(log.read_text() + '{"step": 8, "los')
    train(killed)
    assert_same_run(killed, whole)


def test_data_workers_change_nothing(run_of: RunPlan) -> None:
    alone, helped = run_of("alone"), run_of("helped", data_workers=1)
    train(alone)
    train(helped)
    assert_same_run(helped, alone)


def test_a_finished_run_is_left_as_it_is(run_of: RunPlan) -> None:
    plan = run_of()
    train(plan)
    before = timeless(plan)
    reports: list[StepReport] = []
    assert run_training(plan, ON_ROWS, on_step=lambda report, score: reports.append(report))
    assert reports == []
    assert timeless(plan) == before


def test_another_stage_may_be_added_to_a_finished_run(run_of: RunPlan) -> None:
    plan = run_of()
    train(plan)
    more = replace(plan, stages=(*plan.stages, Stage("third", 2, 4, (1e-4, 1e-4))))
    train(more)
    assert [(line["step"], line["stage"]) for line in read_metrics(Path(plan.output))][-3:] == [
        (14, "second"),
        (15, "third"),
        (16, "third"),
    ]


def test_fresh_weights_follow_from_shape_and_seed(run_of: RunPlan) -> None:
    vision = VisionShape(32, 64, 1, 2, image_size=64, patch_size=8)
    text = TextShape(32, 64, 1, 2, 1, 16, max_position_embeddings=128, rope_theta=1e4, vocab_size=NUM_TOKENS)
    start = Start(shape=Shape(vision, text, 2, 64))
    plans = [run_of(name, start=start, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    for plan in plans:
        train(plan, 1)
    files = [Path(plan.output) / "checkpoints" / "step_00000001" / "model.safetensors" for plan in plans]
    first, second, other = map(load_file, files)
    torch.testing.assert_close(first, second, atol=0, rtol=0)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_engine_is_asked_along_the_way_and_at_the_end(run_of: RunPlan) -> None:
    on_documents = Evaluation(every_steps=6, count=3, max_new_tokens=4, documents=WORDS)
    plan = run_of(evaluation=on_documents)
    scores: list[tuple[int, Score]] = []

    def note(report: StepReport, score: Score | None) -> None:
        if score is not None:
            scores.append((report.step, score))

    run_training(plan, ON_ROWS, on_step=note)
    assert [step for step, _ in scores] == [6, 12, 14]
    assert all(score.cer > 0 and score.exact == 0 and score.seconds > 0 for _, score in scores)
    logged = [(line["step"], line["score"]["cer"]) for line in read_metrics(Path(plan.output)) if "score" in line]
    assert logged == [(step, score.cer) for step, score in scores]


def test_a_held_out_source_is_read_as_far_as_it_goes(run_of: RunPlan) -> None:
    held_out = Evaluation(every_steps=14, count=50, max_new_tokens=4, source=LabelledData("held out"))
    asked: list[int] = []

    def draw(index: int) -> Labelled:
        asked.append(index)
        return WordPictures()(index)

    train(run_of(evaluation=held_out), data=Data(ROWS, SourceData(draw, 3)))
    assert asked == [0, 1, 2]


def test_a_changed_plan_is_refused_and_nothing_is_touched(run_of: RunPlan) -> None:
    plan = run_of()
    train(plan, 3)
    before = {path: path.read_bytes() for path in Path(plan.output).rglob("*") if path.is_file()}
    with pytest.raises(PlanChanged, match=r"prompt: 'Read.' there, 'Look.' here.*Choose another output"):
        train(replace(plan, prompt="Look."))
    assert {path: path.read_bytes() for path in Path(plan.output).rglob("*") if path.is_file()} == before


def test_a_model_that_lies_there_is_not_overwritten(run_of: RunPlan, fresh: Path) -> None:
    plan = run_of()
    there = shutil.copytree(fresh, Path(plan.output) / "model")
    before = {path.name: path.read_bytes() for path in there.iterdir()}
    with pytest.raises(ValueError, match=r"holds a model and no checkpoint.*choose another folder"):
        train(plan)
    assert {path.name: path.read_bytes() for path in there.iterdir()} == before


def test_a_bad_row_is_named_and_the_last_checkpoint_stands(run_of: RunPlan) -> None:
    plan = run_of(stages=(SECOND, replace(SECOND, steps=20)), checkpoint_every=2)
    with pytest.raises(ValueError, match=r"^picture 1[2-9]: the text is empty"):
        train(plan, data=Data(SourceData(WordPictures(empty_from=12), 20)))
    assert latest_checkpoint(Path(plan.output)) is None  # the very first window holds it
    assert not (Path(plan.output) / "model").exists()


def test_a_diverged_run_keeps_its_last_checkpoint(run_of: RunPlan) -> None:
    fine, wild = replace(SECOND, steps=8), replace(SECOND, name="wild", steps=60, learning_rate=(1e30, 1e30))
    plan = run_of(stages=(fine, wild), optimizer=Optimizer("adamw"), checkpoint_every=8)
    with pytest.raises(TrainingDiverged, match="of stage 'wild'"):
        train(plan)
    assert latest_checkpoint(Path(plan.output)) == Path(plan.output) / "checkpoints" / "step_00000008"
    assert not (Path(plan.output) / "model").exists()


def test_a_plan_that_cannot_work_is_refused_before_anything_is_written(run_of: RunPlan) -> None:
    plan = run_of(stages=(replace(FIRST, documents=None),))
    with pytest.raises(ValueError, match=r"`stages\[0\].losses`: glyph 1, reading 0.5.*set them to 0"):
        train(plan)
    assert not Path(plan.output).exists()


def test_a_vocabulary_that_is_not_the_tokenizers_is_refused(run_of: RunPlan) -> None:
    plan = run_of(start=Start(shape=SIZES["tiny"]))
    with pytest.raises(ValueError, match=r"vocab_size is 640; .* has 402 tokens: write that"):
        train(plan)
    assert not Path(plan.output).exists()


def test_the_log_is_json_lines(run_of: RunPlan) -> None:
    plan = run_of()
    train(plan, 2)
    lines = (Path(plan.output) / "metrics.jsonl").read_text().splitlines()
    assert [set(json.loads(line)) for line in lines] == [
        {"step", "stage", "losses", "learning_rate", "grad_norm", "examples", "tokens", "seconds", "time"}
    ] * 2
