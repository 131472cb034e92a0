"""What the types of a plan cannot say: keys that need, or exclude, each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from smolvlm.training.plan import Stage, TrainingPlan


def check_plan(plan: TrainingPlan) -> None:
    """Raise ValueError, a line for every mistake, each naming key, value and remedy."""
    mistakes = list(plan_mistakes(plan))
    if mistakes:
        raise ValueError("\n".join(mistakes))


def plan_mistakes(plan: TrainingPlan) -> Iterator[str]:
    """A line for every mistake."""
    start = plan.start
    if start.id is None and start.shape is None:
        yield "`start`: id null: give `id` (a checkpoint), `shape` (fresh weights), or both (fresh around its encoder)"
    if start.id is None and start.revision is not None:
        yield f"`start.revision`: {start.revision!r}: fresh weights have none; leave it out"
    if plan.compile and plan.checkpoint_activations:
        yield "`compile`: true: does not go together with checkpoint_activations; choose one of them"
    for number, stage in enumerate(plan.stages):
        yield from _stage_mistakes(f"stages[{number}]", stage, plan)
    names = [stage.name for stage in plan.stages]
    for name in plan.average:
        if names.count(name) != 1 or plan.average.count(name) != 1:
            yield f"`average`: {name!r}: name a stage, once; the stages are {', '.join(names)}, and two alike do not do"
        elif not name.strip(".") or "/" in name or "\\" in name:
            yield f"`average`: {name!r}: what this stage ends with goes to a folder of its name; name the stage plainly"
    evaluation = plan.evaluation
    if evaluation is not None and (evaluation.documents is None) == (evaluation.source is None):
        yield "`evaluation`: give either `documents` (built-in ones) or `source` (labelled images), and not both"


def _stage_mistakes(key: str, stage: Stage, plan: TrainingPlan) -> Iterator[str]:
    losses = stage.losses
    if stage.documents is None and plan.source is None:
        yield f"`{key}.documents`: null: the plan has no `source` to read instead; give one of them"
    if stage.documents is None and (losses.glyph or losses.reading):
        yield (
            f"`{key}.losses`: glyph {losses.glyph}, reading {losses.reading}: both need the built-in documents, which "
            "know where every character is; set them to 0"
        )
    if stage.documents is None and stage.num_documents is not None:
        yield f"`{key}.num_documents`: {stage.num_documents}: a source has its own length; leave it out"
    if not any(asdict(losses).values()):
        yield f"`{key}.losses`: all 0: nothing would be learned; give one of them a weight"
    if stage.batch_size % (plan.processes * stage.micro_batches):
        yield (
            f"`{key}.batch_size`: {stage.batch_size}: choose a multiple of processes × micro_batches, which is "
            f"{plan.processes} × {stage.micro_batches}"
        )
    if stage.warmup_steps > stage.steps:
        yield f"`{key}.warmup_steps`: {stage.warmup_steps}: must not exceed the stage's steps, {stage.steps}"
