"""Training on the pipeline's own sources: labelled images become examples, and the plan runs in one process or more."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pipeline.errors import ConfigError, PipelineError, RowFailure
from pipeline.job import Source
from pipeline.labelled import LabelColumns, LabelledSource
from smolvlm.image import decode_image
from smolvlm.training.examples import Labelled
from smolvlm.training.loop import TrainingDiverged
from smolvlm.training.plan import LabelledData, TrainingPlan
from smolvlm.training.run import Data, Listener, SourceData, run_training


@dataclass(frozen=True)
class DrawRow:
    """The rows of a labelled source as training data."""

    source: LabelledSource

    def __call__(self, index: int) -> Labelled:
        """Raises ValueError, naming the row, if its image cannot be read or decoded."""
        try:
            row = self.source[index]
            return Labelled(f"row {index} ({row.name})", decode_image(row.data).image, row.text)
        except RowFailure as failure:  # it names the row
            raise ValueError(str(failure)) from failure
        except ValueError as error:
            raise ValueError(f"row {index}: {error}; mend the image or leave the row out") from error


def train(plan: TrainingPlan, on_step: Listener, is_stopping: Callable[[], bool]) -> Path | None:
    """Train to the end of the plan, or go on with it; give the finished model's folder, or None if stopped before.

    Ray must be running where the plan has more than one process. `on_step` gets every step's report, and the score
    where one was taken. `is_stopping` is asked after every step.
    Raises ConfigError for what a user can cause, TrainingDiverged, PipelineError if the processes keep dying.
    """
    try:
        plan, data = open_data(plan)
        if plan.processes > 1:
            from pipeline.train_processes import train_in_processes  # one process does without Ray

            return train_in_processes(plan, data, num_threads(plan), on_step, is_stopping)
        torch.set_num_threads(num_threads(plan))
        return run_training(plan, data, on_step=on_step, is_stopping=is_stopping)
    except (TrainingDiverged, PipelineError):
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def num_threads(plan: TrainingPlan) -> int:
    """CPU threads that each process computes with."""
    return plan.threads or max(1, (os.cpu_count() or 1) // plan.processes)


def open_data(plan: TrainingPlan) -> tuple[TrainingPlan, Data]:
    """Open the labelled sources of a plan, and note the digest of what it trains on.

    Raises ConfigError: a source or a column does not exist, a text is missing or empty, or the digest is another.
    """
    data = Data()
    if plan.source is not None:
        source, rows = _open(plan.source)
        plan, data = replace(plan, source=source), replace(data, train=rows)
    if plan.evaluation is not None and plan.evaluation.source is not None:
        _, rows = _open(plan.evaluation.source)
        data = replace(data, held_out=rows)
    return plan, data


def _open(labelled: LabelledData) -> tuple[LabelledData, SourceData]:
    source = Source(labelled.uri, column=labelled.column, endpoint_url=labelled.endpoint_url)
    rows = LabelledSource(source, LabelColumns(labelled.text_column))
    if labelled.digest not in (None, rows.digest):
        raise ConfigError(
            f"source {labelled.uri}: its names and texts have the digest {rows.digest}, the plan wants "
            f"{labelled.digest}; the source is not what it was"
        )
    return replace(labelled, digest=rows.digest), SourceData(DrawRow(rows), len(rows))
