import re
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

from smolvlm.training.checkpoint import latest_checkpoint
from smolvlm.training.documents import DocumentOptions
from smolvlm.training.loop import Trainer
from smolvlm.training.plan import Evaluation, LabelledData, Stage, TrainingPlan
from smolvlm.training.probe import Score
from smolvlm.training.run import Data, SourceData, run_training

ON_ROWS = Data(SourceData(WordPictures(), 20))
STAGES = tuple(Stage(name, steps, 4, (2e-3, 1e-3)) for name, steps in (("early", 2), ("middle", 3), ("late", 2)))
RunPlan = Callable[..., TrainingPlan]


@pytest.fixture
def run_of(plan_of: MakePlan, tmp_path: Path) -> RunPlan:
    def make(folder: str, **changes: Any) -> TrainingPlan:
        settings = {"source": LabelledData("by hand"), "stages": STAGES, "average": ("early", "late")}
        return plan_of(**settings | {"output": str(tmp_path / folder)} | changes)

    return make


def train(plan: TrainingPlan, steps: int = 10**9) -> Path | None:
    made = count(1)
    return run_training(plan, ON_ROWS, is_stopping=lambda: next(made) >= steps)


def weights(plan: TrainingPlan, folder: str) -> dict[str, Tensor]:
    return load_file(Path(plan.output) / folder / "model.safetensors")


def last_weights(plan: TrainingPlan) -> dict[str, Tensor]:
    newest = latest_checkpoint(Path(plan.output))
    assert newest is not None
    return load_file(newest / "model.safetensors")


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 0.0) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def test_the_finished_model_is_the_mean_of_what_the_stages_ended_with(run_of: RunPlan) -> None:
    plan = run_of("mean")
    assert train(plan) == Path(plan.output) / "model"
    early, late = weights(plan, "ends/early"), weights(plan, "ends/late")
    assert {path.name for path in (Path(plan.output) / "ends").iterdir()} == {"early", "late"}
    assert_same(weights(plan, "model"), {name: (early[name] + late[name]) / 2 for name in early}, 1e-6)
    assert any(not torch.equal(early[name], late[name]) for name in early)
    for other, end in ((run_of("first", stages=STAGES[:1], average=()), early), (run_of("all", average=()), late)):
        train(other)
        assert_same(weights(other, "model"), end)
    assert_same(last_weights(plan), late)  # training goes on from there, not from the mean


@pytest.mark.parametrize("stops", [(1, 1), (2, 3), (4, 2)])
def test_a_resumed_run_ends_with_the_same_mean(run_of: RunPlan, stops: tuple[int, ...]) -> None:
    """Stopped before, at and after the last step of a stage that counts."""
    whole, parts = run_of("whole"), run_of("parts")
    train(whole)
    assert [train(parts, steps) for steps in stops] == [None] * len(stops)
    train(parts)
    assert_same(weights(parts, "model"), weights(whole, "model"))


def test_a_run_killed_before_its_model_was_written_still_writes_the_mean(run_of: RunPlan) -> None:
    plan = run_of("killed")
    train(plan)
    mean = weights(plan, "model")
    shutil.rmtree(Path(plan.output) / "model")
    train(plan)
    assert_same(weights(plan, "model"), mean)


def test_a_stage_that_was_not_kept_cannot_be_counted_later(run_of: RunPlan) -> None:
    plan = run_of("late", average=())
    train(plan)
    before = weights(plan, "model")
    with pytest.raises(ValueError, match=r"`average`: 'early': this stage has ended, and .*ends/early.*leave it out"):
        train(replace(plan, average=("early", "late")))
    assert_same(weights(plan, "model"), before)
    more = replace(plan, stages=(*STAGES, replace(STAGES[0], name="more")), average=("more",))
    train(more)
    assert_same(weights(more, "model"), weights(more, "ends/more"))


def test_the_last_score_is_of_the_mean(run_of: RunPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = run_of("scored", evaluation=Evaluation(every_steps=100, documents=DocumentOptions()))
    measured: list[Path] = []

    def probe(plan: TrainingPlan, options: Evaluation, trainer: Trainer, source: SourceData | None) -> Score:
        measured.append(trainer.save_model(Path(plan.output) / "measured"))
        return Score(0.0, 0.0, 1.0, 0.0)

    monkeypatch.setattr("smolvlm.training.run.probe", probe)
    train(plan)
    assert len(measured) == 1
    assert_same(weights(plan, "measured"), weights(plan, "model"))


@pytest.mark.parametrize("average", [("none such",), ("early", "early"), ("twice",)])
def test_only_a_stage_can_be_named_and_only_once(run_of: RunPlan, average: tuple[str, ...]) -> None:
    twice = replace(STAGES[0], name="twice")
    plan = run_of("refused", stages=(*STAGES, twice, twice), average=average)
    with pytest.raises(ValueError, match=f"`average`: '{average[0]}': name a stage, once; the stages are early, mi"):
        train(plan)
    assert not Path(plan.output).exists()


@pytest.mark.parametrize("name", ["", "..", "../model", "a/b", "a\\b"])
def test_a_stage_whose_name_is_no_folder_is_not_averaged(run_of: RunPlan, name: str) -> None:
    """`ends/..` is the run's own folder, with its checkpoints."""
    plan = run_of("refused", stages=(*STAGES, replace(STAGES[0], name=name)), average=(name,))
    with pytest.raises(ValueError, match=f"`average`: {re.escape(repr(name))}: what this stage ends with goes to a"):
        train(plan)
    assert not Path(plan.output).exists()
