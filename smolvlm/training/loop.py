"""The training loop: one optimizer step after another, from wherever the last checkpoint stopped."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute

from smolvlm.model import SmolVLM
from smolvlm.precision import dtype_named
from smolvlm.training.batches import Batch, Share, Windows, steps
from smolvlm.training.checkpoint import head_state, load_state, save_checkpoint, save_model, step_of
from smolvlm.training.objective import Objective, loss_sizes
from smolvlm.training.optimizer import build_optimizers, freeze, learning_rate, set_learning_rate
from smolvlm.training.plan import Stage, TrainingPlan


class TrainingDiverged(ValueError):
    """A loss or gradient is not a number; nothing of it was saved."""


@dataclass(frozen=True)
class Process:
    """This process's place among those that train together."""

    rank: int = 0
    world: int = 1


ALONE = Process()


@dataclass(frozen=True)
class StepReport:
    """One optimizer step: its number from 1, what all processes did in it, and seconds, data not counted."""

    step: int
    stage: str
    losses: dict[str, float]
    learning_rate: float
    grad_norm: float
    examples: int
    tokens: int
    seconds: float


class Trainer:
    """Model, optimizer and step number. `directory` is the checkpoint it starts from: a model, or one to resume."""

    def __init__(self, plan: TrainingPlan, directory: Path, process: Process = ALONE) -> None:
        torch.manual_seed(plan.seed)
        self.plan, self.process, self.device = plan, process, torch.device(plan.device)
        self.is_bfloat16 = dtype_named(plan.precision, self.device) == torch.bfloat16
        self.files_from = directory
        self.model = SmolVLM.from_pretrained(directory, self.device).train()
        self.objective = Objective(self.model).to(self.device)
        self.objective.requires_grad_(True)
        self.optimizers = build_optimizers(self.objective, plan.optimizer)
        self.step = 0
        if plan.checkpoint_activations:
            _recompute_layers(self.model)
        self._wrapped = self._wrap()

    def resume(self, checkpoint: Path) -> None:
        """Take over optimizer, auxiliary head and step; the model itself was loaded from the same folder."""
        state = load_state(checkpoint)
        self.objective.glyph_head.load_state_dict(state["glyph_head"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = step_of(checkpoint)

    def run(self, windows_of: Callable[[int], Windows]) -> Iterator[StepReport]:
        """Train to the end of the plan, a report each step. `windows_of(stage number)` gives a stage's data.

        Raises TrainingDiverged, or ValueError from the data, naming the example.
        """
        while self.step < self.plan.total_steps:
            number, done = self.plan.stage_at(self.step)
            stage = self.plan.stages[number]
            freeze(self.objective, stage.freeze)
            pin = self.device.type == "cuda"
            for micro_batches in steps(windows_of(number), done, stage.steps, self.plan.data_workers, pin):
                yield self._report(stage, micro_batches)

    def _report(self, stage: Stage, micro_batches: list[Batch]) -> StepReport:
        started = time.perf_counter()
        rate = learning_rate(stage, self.plan.stage_at(self.step)[1])
        losses, grad_norm = self._update(stage, micro_batches, rate)
        self.step += 1
        return StepReport(
            step=self.step,
            stage=stage.name,
            losses=losses,
            learning_rate=rate,
            grad_norm=grad_norm,
            examples=sum(len(batch.token_ids) for batch in micro_batches) * self.process.world,
            tokens=sum(batch.token_ids.numel() for batch in micro_batches) * self.process.world,
            seconds=time.perf_counter() - started,
        )

    def _update(self, stage: Stage, micro_batches: list[Batch], rate: float) -> tuple[dict[str, float], float]:
        sizes = [loss_sizes(batch) for batch in micro_batches]
        whole = self._mean_over_processes({name: sum(size[name] for size in sizes) for name in sizes[0]})
        sums: dict[str, float] = {}
        for number, (batch, size) in enumerate(zip(micro_batches, sizes, strict=True)):
            with self._syncing(number == len(micro_batches) - 1):
                for name, value in self._backward(stage, batch, size, whole).items():
                    sums[name] = sums.get(name, 0.0) + value
        losses = self._mean_over_processes(sums)
        grad_norm = nn.utils.clip_grad_norm_(self.objective.parameters(), self.plan.optimizer.max_grad_norm).item()
        self._check_finite(stage, losses, grad_norm)
        set_learning_rate(self.optimizers, rate)
        for optimizer in self.optimizers:
            optimizer.step()
        self.objective.zero_grad(set_to_none=True)
        return losses, grad_norm

    def _backward(
        self, stage: Stage, batch: Batch, size: dict[str, float], whole: dict[str, float]
    ) -> dict[str, float]:
        """Add a micro-batch's gradients and give its part of each loss."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_bfloat16):
            losses: dict[str, Tensor] = self._wrapped(batch.to(self.device), stage.losses)
        share = {name: size[name] / whole[name] for name in losses}
        total = sum(
            (getattr(stage.losses, name) * share[name] * loss for name, loss in losses.items()), torch.zeros(())
        )
        total.backward()
        return {name: loss.item() * share[name] for name, loss in losses.items()}

    def _check_finite(self, stage: Stage, losses: dict[str, float], grad_norm: float) -> None:
        if not all(map(_is_finite, (*losses.values(), grad_norm))):
            raise TrainingDiverged(
                f"step {self.step + 1} of stage {stage.name!r}: losses {losses}, gradient norm {grad_norm}; the last "
                "checkpoint stands. Lower learning_rate or max_grad_norm, lengthen warmup_steps, or look at the data"
            )

    def save(self) -> Path:
        """Write a checkpoint to resume from."""
        state = {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "glyph_head": head_state(self.objective.glyph_head),
        }
        # The next one takes its files from here: what a resumed run began with is removed before long.
        self.files_from = save_checkpoint(self.plan, self.step, self.model, self.files_from, state)
        return self.files_from

    def save_model(self, directory: Path) -> Path:
        return save_model(self.model, self.files_from, directory, self.plan.save_dtype)

    def share(self, stage: Stage) -> Share:
        return Share(self.process.rank, self.process.world, stage.batch_size, stage.micro_batches)

    def _wrap(self) -> nn.Module:
        if self.plan.compile:
            _compile_layers(self.model)
        if self.process.world == 1:
            return self.objective
        # A stage may leave a part without a loss, or frozen.
        return DistributedDataParallel(self.objective, find_unused_parameters=True)

    def _syncing(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Processes exchange gradients once a step, with the last micro-batch."""
        if last or not isinstance(self._wrapped, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._wrapped.no_sync()

    def is_wanted_by_any(self, wish: bool) -> bool:
        """Whether any of the processes wishes it; all of them have to ask."""
        return self._mean_over_processes({"wish": float(wish)})["wish"] > 0

    def _mean_over_processes(self, values: dict[str, float]) -> dict[str, float]:
        if self.process.world == 1:
            return values
        sums = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(sums)
        return dict(zip(values, (sums / self.process.world).tolist(), strict=True))


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")


def _compile_layers(model: SmolVLM) -> None:
    """Compile what repeats and is all tensors: a graph for the encoder's layers and one for the decoder's MLPs, instead
    of one for the whole model, which takes minutes. Sizes differ from batch to batch."""
    for module in (*model.vision.layers, *(layer.mlp for layer in model.text.layers)):
        module.compile(dynamic=True)


def _recompute_layers(model: SmolVLM) -> None:
    """Keep no activations inside a layer: compute them again when its gradient is due."""
    for layer in (*model.vision.layers, *model.text.layers):
        forward = layer.forward

        def again(*arguments: object, _forward: Callable[..., Tensor] = forward) -> Tensor:
            return recompute(_forward, *arguments, use_reentrant=False)  # type: ignore[no-any-return]

        layer.forward = again
