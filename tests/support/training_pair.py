"""Two training processes joined by gloo, each with its own half of every step: a script for the tests to start twice.

python training_pair.py RANK RENDEZVOUS_FILE PLAN.pickle OUT.pt
"""

import pickle
import sys
from pathlib import Path
from typing import TypedDict

import torch
import torch.distributed
from torch import Tensor
from word_pictures import WordPictures

from smolvlm.training.batches import WINDOW_STEPS, Batch, Share, Window, Windows, collate
from smolvlm.training.examples import ExampleMaker
from smolvlm.training.loop import Process, Trainer
from smolvlm.training.plan import TrainingPlan


class Trained(TypedDict):
    """What came of it: weights, losses and gradient norms of every step, and whether one of the two wished to stop."""

    weights: dict[str, Tensor]
    losses: list[dict[str, float]]
    grad_norms: list[float]
    stopping: bool


class Halves(Windows):
    """Every step is two micro-batches of unequal length; a rank gets one of them, rank None both."""

    def __init__(self, make: ExampleMaker, rank: int | None) -> None:
        share = Share(0, 1, 6, 2) if rank is None else Share(rank, 2, 6, 1)
        super().__init__(WordPictures(), make, share, None, seed=0)
        self.rank = rank

    def __getitem__(self, window: int) -> Window:
        return [self._step(window * WINDOW_STEPS + step) for step in range(WINDOW_STEPS)]

    def _step(self, step: int) -> list[Batch]:
        halves = [self._batch(step, 5, 0), self._batch(step + 3, 3, 8)]  # short words; longer ones
        return halves if self.rank is None else [halves[self.rank]]

    def _batch(self, *indices: int) -> Batch:
        return collate([self.make(self.draw(index)) for index in indices], self.make.config.image_token_id)


def trained(plan: TrainingPlan, process: Process, rank: int | None) -> Trained:
    """Train to the end."""
    assert plan.start.id is not None
    directory = Path(plan.start.id)
    trainer = Trainer(plan, directory, process)
    halves = Halves(ExampleMaker(directory, plan.prompt), rank)
    reports = list(trainer.run(lambda _: halves))
    return {
        "weights": trainer.objective.state_dict(),
        "losses": [report.losses for report in reports],
        "grad_norms": [report.grad_norm for report in reports],
        "stopping": trainer.is_wanted_by_any(process.rank == 1),
    }


def main(rank: int, rendezvous: str, plan_file: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    plan = pickle.loads(Path(plan_file).read_bytes())
    torch.save(trained(plan, Process(rank, 2), rank), out)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
