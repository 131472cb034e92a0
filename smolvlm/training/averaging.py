"""The mean of weights: a finished model that is the average of what several stages ended with.

Where the learning rate falls, the weights settle somewhere in a wide valley of the loss; the mean of several such
places lies nearer its middle and makes fewer mistakes than each (Izmailov et al., https://arxiv.org/abs/1803.05407).

    OUTPUT/ends/NAME/  what the stage NAME ended with, a model in the published format, float32
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from smolvlm.model import SmolVLM
from smolvlm.training.checkpoint import save_model
from smolvlm.training.plan import TrainingPlan

if TYPE_CHECKING:
    from smolvlm.training.loop import Trainer

ENDS = "ends"


def check_ends(plan: TrainingPlan, step: int) -> None:
    """Raise ValueError where a stage to average ended before `step` without being kept."""
    for name in plan.average:
        folder = _end(plan, name)
        if plan.ends[name] <= step and not folder.exists():
            raise ValueError(
                f"`average`: {name!r}: this stage has ended, and {folder} with its weights is not there; leave it "
                "out, or choose another output to train again"
            )


def keep_end(plan: TrainingPlan, trainer: Trainer) -> None:
    """Write the weights where a stage to average ends with the step just done."""
    for name in plan.average:
        if plan.ends[name] == trainer.step:
            save_model(trainer.model, trainer.files_from, _end(plan, name))


@torch.no_grad()
def take_mean(plan: TrainingPlan, trainer: Trainer) -> None:
    """Give the trainer's model the mean of the weights kept; without `average` it stays what it is."""
    for number, name in enumerate(plan.average):
        kept = SmolVLM.from_pretrained(_end(plan, name), trainer.device)
        for mean, weight in zip(trainer.model.parameters(), kept.parameters(), strict=True):
            mean.lerp_(weight, 1 / (number + 1))


def _end(plan: TrainingPlan, name: str) -> Path:
    return Path(plan.output) / ENDS / name
