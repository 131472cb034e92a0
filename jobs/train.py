"""`smolvlm train`: a training plan → OUTPUT/model, metrics.jsonl and loss.png, resuming what an earlier run began."""

import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs.progress import duration
from jobs.run import draining, ray_session
from jobs.training_progress import Display, Meter, State
from pipeline.train import train as train_plan
from smolvlm.training.loop import StepReport
from smolvlm.training.plan import TrainingPlan
from smolvlm.training.plot import plot_metrics
from smolvlm.training.probe import Score

STOPPING = "stopping: a checkpoint is saved after this step; interrupt again to abort"


@dataclass(frozen=True)
class Summary:
    """What a training did. `model` is None where it was interrupted; `state` is None where all was done before."""

    model: str | None
    plot: str
    output: str
    interrupted: bool
    steps: int
    total_steps: int
    elapsed_s: float
    state: State | None


def train(plan: TrainingPlan, display: Display) -> Summary:
    """Train, or go on training, and draw what was measured.

    The first SIGINT or SIGTERM saves a checkpoint after the step (Summary.interrupted); the second raises
    KeyboardInterrupt. Raises ConfigError, PipelineError, TrainingDiverged.
    """
    started = time.monotonic()
    shown = _Shown(plan, display)
    with draining(shown.stop, display.say, STOPPING):
        if plan.processes > 1:
            with ray_session():
                model = train_plan(plan, shown, shown.stop.is_set)
        else:
            model = train_plan(plan, shown, shown.stop.is_set)
    plot = plot_metrics(Path(plan.output))
    return Summary(
        model=None if model is None else str(model),
        plot=str(plot),
        output=plan.output,
        interrupted=model is None,
        steps=shown.steps,
        total_steps=plan.total_steps,
        elapsed_s=time.monotonic() - started,
        state=shown.state,
    )


class _Shown:
    """Hands every step to the display, and keeps the last state."""

    def __init__(self, plan: TrainingPlan, display: Display) -> None:
        self.stop = threading.Event()
        self.steps = 0
        self.state: State | None = None
        self._meter, self._display = Meter(plan), display

    def __call__(self, report: StepReport, score: Score | None) -> None:
        self.steps += 1
        self.state = self._meter(report, score)
        self._display(self.state)


def summary_object(summary: Summary) -> dict[str, Any]:
    """Return the last object of a training."""
    return {"event": "summary", **asdict(summary)}


def summary_text(summary: Summary) -> str:
    """Return the last lines of a training for a person."""
    state = "stopped early; run the same command again to go on" if summary.interrupted else "finished"
    lines = [f"{state}: {summary.steps:,} steps of {summary.total_steps:,} in {duration(summary.elapsed_s)}"]
    if summary.state is not None:
        lines.append("losses: " + ", ".join(f"{name} {value:.4f}" for name, value in summary.state.losses.items()))
        if summary.state.score is not None:
            cer, wer, exact = (summary.state.score[name] for name in ("cer", "wer", "exact"))
            lines.append(f"last score: CER {cer:.1%}, WER {wer:.1%}, exact {exact:.1%}")
    if summary.model is not None:
        lines.append(f"model: {summary.model}")
    return "\n".join([*lines, f"curves: {summary.plot}", f"output: {summary.output}"])
