"""Training in several processes: Ray Train starts them, joins them for DDP, and starts them again when one dies.

Checkpoints lie in the plan's output folder, which all processes have to reach; after a death all go on from the last.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from pipeline.errors import ConfigError, PipelineError
from smolvlm.training.loop import Process, StepReport
from smolvlm.training.plan import TrainingPlan
from smolvlm.training.probe import Score
from smolvlm.training.run import Data, Listener, run_training

MAX_RESTARTS = 3  # in one run; what keeps dying has to stop
RAY_FOLDER = ".ray"  # in the output: what Ray Train notes about its own state
_POLL_S = 0.5


class Board:
    """What processes and driver tell each other, in an actor of its own: reports one way, "stop" the other."""

    def __init__(self) -> None:
        self._reports: list[tuple[StepReport, Score | None]] = []
        self._is_stopping = False
        self._mistake: ValueError | None = None
        self._model: Path | None = None

    def report(self, report: StepReport, score: Score | None) -> None:
        """Note a step."""
        self._reports.append((report, score))

    def take(self) -> list[tuple[StepReport, Score | None]]:
        """Return the steps noted since the last call."""
        taken, self._reports = self._reports, []
        return taken

    def stop(self) -> None:
        """Ask the processes to save and end."""
        self._is_stopping = True

    def is_stopping(self) -> bool:
        """Whether that was asked."""
        return self._is_stopping

    def fail(self, mistake: ValueError) -> None:
        """Note what a new start would not mend."""
        self._mistake = self._mistake or mistake

    def mistake(self) -> ValueError | None:
        """Return what was noted first."""
        return self._mistake

    def finish(self, model: Path | None) -> None:
        """Note the finished model."""
        self._model = model

    def model(self) -> Path | None:
        """Return it; None where the processes were stopped before."""
        return self._model


@dataclass(frozen=True)
class Work:
    """What every process gets."""

    plan: TrainingPlan
    data: Data
    threads: int
    board: Any


def train_in_processes(
    plan: TrainingPlan, data: Data, threads: int, on_step: Listener, is_stopping: Callable[[], bool]
) -> Path | None:
    """Train with `plan.processes` processes of `threads` CPU threads; give the finished model's folder, or None.

    Ray must be running. Raises ConfigError where it has too few CPUs or GPUs, ValueError (TrainingDiverged and others)
    from a process, PipelineError where the processes died more than MAX_RESTARTS times.
    """
    _check_room(plan)
    plan = replace(plan, output=str(Path(plan.output).absolute()))  # processes have working directories of their own
    board: Any = ray.remote(Board).options(num_cpus=0).remote()
    fitting = _Fitting(_trainer(Work(plan, data, threads, board)))
    fitting.start()
    has_told = False
    while fitting.is_alive():
        fitting.join(_POLL_S)
        if is_stopping() and not has_told:
            has_told = True
            board.stop.remote()
        _pass_on(board, on_step)
        _raise_mistake(board)
    _pass_on(board, on_step)
    _raise_mistake(board)
    if fitting.error is not None:
        raise PipelineError(
            f"the processes died more than {MAX_RESTARTS} times; the last checkpoint stands. The last death: "
            f"{_last_line(fitting.error)}"
        ) from fitting.error
    model: Path | None = ray.get(board.model.remote())
    return model


class _Fitting(threading.Thread):
    """Ray Train's own loop, off the main thread, where it would take Ctrl-C for itself."""

    def __init__(self, trainer: TorchTrainer) -> None:
        super().__init__(daemon=True)
        self.error: Exception | None = None
        self._trainer = trainer

    def run(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:  # whatever it is ends the training, in the thread that waits for it
            self.error = error
        except SystemExit:  # Ray was shut down under it: nobody waits any more
            return


def _trainer(work: Work) -> TorchTrainer:
    is_on_gpu = work.plan.device == "cuda"
    return TorchTrainer(
        _work,
        train_loop_config={"work": work},
        torch_config=TorchConfig(backend="nccl" if is_on_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=work.plan.processes, use_gpu=is_on_gpu),
        run_config=RunConfig(
            name=work.plan.name,
            storage_path=str(Path(work.plan.output) / RAY_FOLDER),
            failure_config=FailureConfig(max_failures=MAX_RESTARTS),
        ),
    )


def _work(settings: dict[str, Work]) -> None:
    """One process, from its start or new start to the end."""
    work = settings["work"]
    if ray.get(work.board.mistake.remote()) is not None:
        return  # the driver raises it
    torch.set_num_threads(work.threads)
    context = ray.train.get_context()
    process = Process(context.get_world_rank(), context.get_world_size())
    is_first = process.rank == 0

    def on_step(report: StepReport, score: Score | None) -> None:
        if is_first:
            work.board.report.remote(report, score)

    def is_stopping() -> bool:
        return is_first and bool(ray.get(work.board.is_stopping.remote()))

    try:
        model = run_training(work.plan, work.data, process, on_step, is_stopping)
    except ValueError as error:
        ray.get(work.board.fail.remote(error))
        raise
    if is_first:
        ray.get(work.board.finish.remote(model))


def _check_room(plan: TrainingPlan) -> None:
    """Ray would wait without a word."""
    kind = "GPU" if plan.device == "cuda" else "CPU"
    there = int(ray.cluster_resources().get(kind, 0))  # type: ignore[no-untyped-call]
    if there < plan.processes:
        raise ConfigError(f"`processes`: {plan.processes}: Ray has {there} {kind}s here, one for each is needed")


def _pass_on(board: Any, on_step: Listener) -> None:
    for report, score in ray.get(board.take.remote()):
        on_step(report, score)


def _raise_mistake(board: Any) -> None:
    """At once: Ray Train will start the processes again, and they will find the mistake noted and end."""
    mistake: ValueError | None = ray.get(board.mistake.remote())
    if mistake is not None:
        raise mistake


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
