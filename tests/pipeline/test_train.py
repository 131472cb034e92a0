"""Training on labelled sources, and in two processes that may die."""

import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mortal_pictures import COUNT, MortalPictures
from safetensors.torch import load_file
from word_pictures import WORDS, WordPictures

from pipeline import train_processes
from pipeline.errors import ConfigError, PipelineError
from pipeline.train import num_threads, open_data, train
from pipeline.train_processes import train_in_processes
from smolvlm.scratch import Shape, TextShape, VisionShape
from smolvlm.training.checkpoint import latest_checkpoint, load_state
from smolvlm.training.fresh import NUM_TOKENS
from smolvlm.training.loop import StepReport
from smolvlm.training.plan import Evaluation, LabelledData, Optimizer, Stage, Start, TrainingPlan
from smolvlm.training.run import Data, SourceData, run_training

TEXT = TextShape(32, 64, 2, 2, 1, 16, max_position_embeddings=128, rope_theta=1e4, vocab_size=NUM_TOKENS)
SHAPE = Shape(VisionShape(32, 64, 1, 2, image_size=64, patch_size=8), TEXT, scale_factor=2, longest_edge=64)
BATCH = 4


def png(index: int) -> bytes:
    buffer = io.BytesIO()
    WordPictures()(index).image.save(buffer, "PNG")
    return buffer.getvalue()


def write_source(path: Path, **columns: Any) -> Path:
    """Write a Parquet file of twenty pictures of words, with some columns changed."""
    table = {"image": [png(index) for index in range(20)], "text": list(WORDS)} | columns
    pq.write_table(pa.table(table), path)
    return path


@pytest.fixture
def plan(tmp_path: Path) -> TrainingPlan:
    source = LabelledData(str(write_source(tmp_path / "words.parquet")))
    return TrainingPlan(
        name="words",
        output=str(tmp_path / "run"),
        start=Start(shape=SHAPE),
        stages=(Stage("words", 3, BATCH, (1e-3, 1e-3)),),
        source=source,
        optimizer=Optimizer("adamw"),
        precision="float32",
        data_workers=0,
        threads=1,
    )


def silent(report: object, score: object) -> None:
    pass


def never() -> bool:
    return False


def test_a_source_is_learned_row_by_row(plan: TrainingPlan) -> None:
    _, data = open_data(plan)
    assert data.train is not None
    assert data.train.count == 20
    for index in (0, 7, 19):
        row = data.train.draw(index)
        assert row.text == WORDS[index]
        assert row.image.tobytes() == WordPictures()(index).image.tobytes()
        assert re.search(rf"row {index} \(.*words.parquet", row.name)


def test_training_and_measuring_on_sources(plan: TrainingPlan, tmp_path: Path) -> None:
    held_out = LabelledData(str(write_source(tmp_path / "held_out.parquet")))
    plan = replace(plan, evaluation=Evaluation(3, 2, 4, source=held_out), data_workers=1)
    scores: list[Any] = []
    assert train(plan, lambda report, score: scores.append(score), never) == Path(plan.output) / "model"
    assert [score is None for score in scores] == [True, True, False]
    noted = load_state(latest_checkpoint(Path(plan.output)) or Path())["plan"]["source"]
    assert re.fullmatch("[0-9a-f]{64}", noted["digest"])


def test_a_source_that_has_changed_is_noticed_on_resume(plan: TrainingPlan) -> None:
    assert train(plan, silent, lambda: True) is None  # stopped after its first step
    assert plan.source is not None
    write_source(Path(plan.source.uri), text=[*WORDS[:-1], "another"])
    with pytest.raises(ConfigError, match=r"source: .*digest.* there, .*digest.* here.*Choose another output"):
        train(plan, silent, never)


def test_a_digest_in_the_plan_is_held(plan: TrainingPlan) -> None:
    assert plan.source is not None
    with pytest.raises(ConfigError, match=r"the plan wants abc; the source is not what it was"):
        open_data(replace(plan, source=replace(plan.source, digest="abc")))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no such column": ({"text": None}, r"no column 'text'"),
    "an empty text": ({"text": [*WORDS[:5], " ", *WORDS[6:]]}, r"row 5 .*text.* is empty"),
    "no text": ({"text": list(range(20))}, r"row 0 .*'text' is 0, no text"),
    "no picture": ({"image": [b"no picture"] * 20}, r"row \d+: .*mend the image or leave the row out"),
    "too long": ({"text": ["x" * 200] * 20}, r"row \d+ \(.*\): prompt and text have \d+ tokens.*holds 128"),
}


@pytest.mark.parametrize(("columns", "said"), BAD.values(), ids=BAD)
def test_bad_data_is_named(plan: TrainingPlan, columns: dict[str, Any], said: str) -> None:
    assert plan.source is not None
    path = write_source(Path(plan.source.uri), **{name: value for name, value in columns.items() if value is not None})
    if columns.get("text", "") is None:
        pq.write_table(pq.read_table(path).rename_columns(["image", "words"]), path)
    with pytest.raises(ConfigError, match=said):
        train(plan, silent, never)
    assert not (Path(plan.output) / "model").exists()
    assert latest_checkpoint(Path(plan.output)) is None


def test_threads_are_shared_by_the_processes(plan: TrainingPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    plans = (plan, replace(plan, threads=None), replace(plan, threads=None, processes=3))
    assert [num_threads(each) for each in plans] == [1, 8, 2]


@pytest.fixture
def pair_of(plan: TrainingPlan, tmp_path: Path, ray_cluster: str) -> Callable[..., tuple[TrainingPlan, Data]]:
    """A plan of two processes over two windows, and its data."""

    def make(**of_draw: int) -> tuple[TrainingPlan, Data]:
        stages = (Stage("words", 12, BATCH, (1e-3, 1e-3)),)
        draw = MortalPictures(BATCH, tmp_path / "grave", **of_draw)
        pair = replace(plan, source=LabelledData("by hand"), stages=stages, processes=2, checkpoint_every=2)
        return pair, Data(SourceData(draw, COUNT))

    return make


@pytest.mark.timeout(900)  # Ray's workers are nice to others, and so slow on a busy machine
def test_two_processes_stop_die_and_still_do_what_one_does(
    pair_of: Callable[..., tuple[TrainingPlan, Data]], tmp_path: Path
) -> None:
    plan, data = pair_of(fatal=40, deaths=1)  # of the second window
    steps: list[int] = []

    def note(report: StepReport, score: object) -> None:
        steps.append(report.step)

    assert train_in_processes(plan, data, 1, note, lambda: len(steps) >= 2) is None
    stopped_at = len(steps)
    assert steps == list(range(1, stopped_at + 1))
    assert train_in_processes(plan, data, 1, note, never) == Path(plan.output) / "model"
    assert (tmp_path / "grave").read_text() == "x"
    assert steps[-1] == 12
    alone = replace(plan, processes=1, output=str(tmp_path / "alone"))
    model = run_training(alone, data)
    assert model is not None
    ours, theirs = (load_file(Path(each.output) / "model" / "model.safetensors") for each in (plan, alone))
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


@pytest.mark.timeout(900)
def test_what_keeps_dying_ends_the_training(
    pair_of: Callable[..., tuple[TrainingPlan, Data]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_processes, "MAX_RESTARTS", 0)
    plan, data = pair_of(fatal=1, deaths=9)
    with pytest.raises(PipelineError, match=r"died more than 0 times; the last checkpoint stands"):
        train_in_processes(plan, data, 1, silent, never)


@pytest.mark.timeout(900)
def test_a_mistake_is_not_tried_again(pair_of: Callable[..., tuple[TrainingPlan, Data]]) -> None:
    plan, _ = pair_of()
    data = Data(SourceData(WordPictures(empty_from=0), 20))
    with pytest.raises(ValueError, match=r"^picture \d+: the text is empty"):
        train_in_processes(plan, data, 1, silent, never)


def test_more_processes_than_cpus_are_refused(plan: TrainingPlan, ray_cluster: str) -> None:
    many = replace(plan, processes=4)
    with pytest.raises(ConfigError, match=r"`processes`: 4: Ray has 2 CPUs here"):
        train(many, silent, never)
