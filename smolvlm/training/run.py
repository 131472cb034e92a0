"""A whole training run: begin or resume, train, measure, save."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smolvlm.hub import resolve_checkpoint
from smolvlm.training.averaging import check_ends, keep_end, take_mean
from smolvlm.training.batches import Windows
from smolvlm.training.checkpoint import check_unchanged, latest_checkpoint
from smolvlm.training.checks import check_plan
from smolvlm.training.documents import DocumentGenerator
from smolvlm.training.examples import Draw, DrawDocument, ExampleMaker
from smolvlm.training.fresh import create_fresh_checkpoint
from smolvlm.training.loop import ALONE, Process, StepReport, Trainer
from smolvlm.training.plan import TrainingPlan
from smolvlm.training.probe import Score, probe

METRICS_FILE = "metrics.jsonl"
SEEDS_PER_RUN = 1000  # a stage draws from a seed of its own: seed * SEEDS_PER_RUN + its number


@dataclass(frozen=True)
class SourceData:
    """A labelled source, opened: how to get the example of an index, and how many there are."""

    draw: Draw
    count: int


@dataclass(frozen=True)
class Data:
    """The labelled sources of a plan, opened: `plan.source` and `plan.evaluation.source`."""

    train: SourceData | None = None
    held_out: SourceData | None = None


Listener = Callable[[StepReport, Score | None], None]


def run_training(
    plan: TrainingPlan,
    data: Data = Data(),
    process: Process = ALONE,
    on_step: Listener | None = None,
    is_stopping: Callable[[], bool] = lambda: False,
) -> Path | None:
    """Train to the end of the plan and give the directory of the finished model.

    Resumes from the newest checkpoint in `plan.output`, exactly: the rest of the run is what it would have been.
    As soon as `is_stopping` says so in any process, all save a checkpoint after their step and give None.
    Raises ValueError for a plan that does not fit its data, model or output, before anything is written.
    """
    check_plan(plan)
    begin_from = _begin(plan, process)
    trainer = Trainer(plan, begin_from, process)
    if begin_from == latest_checkpoint(Path(plan.output)):
        trainer.resume(begin_from)
    check_ends(plan, trainer.step)
    if trainer.step == plan.total_steps:
        take_mean(plan, trainer)
    log = MetricsLog(Path(plan.output), trainer.step) if process.rank == 0 else None
    for report in trainer.run(lambda number: _windows(plan, number, trainer, data.train)):
        stops = report.step < plan.total_steps and trainer.is_wanted_by_any(is_stopping())
        score = None if log is None else _kept(plan, trainer, data.held_out, log, report, stops)
        if on_step is not None:
            on_step(report, score)
        if stops:
            return None
    finished = Path(plan.output) / "model"
    return trainer.save_model(finished) if log is not None else finished


def _kept(
    plan: TrainingPlan, trainer: Trainer, source: SourceData | None, log: MetricsLog, report: StepReport, stops: bool
) -> Score | None:
    """Log a step, write the weights that are due after it, and measure where it is time to; the process of rank 0."""
    is_last = report.step == plan.total_steps
    log.write(asdict(report) | {"time": round(time.time(), 3)})
    keep_end(plan, trainer)  # first: what is resumed after the end of a stage counts on it
    if is_last or stops or report.step % plan.checkpoint_every == 0:
        trainer.save()
    if is_last:
        take_mean(plan, trainer)
    score = _score(plan, trainer, source, report.step, is_last)
    if score is not None:
        log.write({"step": report.step, "score": asdict(score)})
    return score


def _begin(plan: TrainingPlan, process: Process) -> Path:
    """The checkpoint to load: the run's newest, else what the plan starts from."""
    output = Path(plan.output)
    newest = latest_checkpoint(output)
    if newest is not None:
        check_unchanged(plan, newest)
        return newest
    if (output / "model").exists():
        raise ValueError(f"output {output} holds a model and no checkpoint to go on from; choose another folder")
    start = plan.start
    given = None if start.id is None else resolve_checkpoint(start.id, start.revision)
    if start.shape is None:
        assert given is not None, "check_plan saw to it"
        return given
    return create_fresh_checkpoint(output / f"fresh_{process.rank}", start.shape, plan.seed, given, start.keep)


def _windows(plan: TrainingPlan, number: int, trainer: Trainer, source: SourceData | None) -> Windows:
    stage = plan.stages[number]
    make = ExampleMaker(trainer.files_from, plan.prompt)  # not where the run began: that checkpoint may be gone by now
    share, seed = trainer.share(stage), plan.seed * SEEDS_PER_RUN + number
    if stage.documents is None:
        assert source is not None, "check_plan saw to it"
        return Windows(source.draw, make, share, source.count, seed)
    draw = DrawDocument(DocumentGenerator("train", seed, stage.documents))
    return Windows(draw, make, share, stage.num_documents, seed)


def _score(plan: TrainingPlan, trainer: Trainer, source: SourceData | None, step: int, is_last: bool) -> Score | None:
    if plan.evaluation is None or not (is_last or step % plan.evaluation.every_steps == 0):
        return None
    return probe(plan, plan.evaluation, trainer, source)


class MetricsLog:
    """metrics.jsonl: a line for every step and one for every score, cut back to where a resumed run begins."""

    def __init__(self, output: Path, step: int) -> None:
        self.file = output / METRICS_FILE
        kept = [line for line in read_metrics(output) if line["step"] <= step]
        output.mkdir(parents=True, exist_ok=True)
        rewritten = self.file.with_suffix(".new")
        rewritten.write_text("".join(map(_as_line, kept)), encoding="utf-8")
        rewritten.replace(self.file)

    def write(self, content: dict[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(_as_line(content))


def read_metrics(output: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last one that a kill has cut short is left out."""
    file = output / METRICS_FILE
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def _as_line(content: dict[str, Any]) -> str:
    return json.dumps(content) + "\n"
