"""The optimizers, their parameter groups, and the learning-rate curve."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable

import torch
from torch import nn

from smolvlm.training.plan import Optimizer, Part, Stage

PARTS: dict[Part, tuple[str, ...]] = {
    "vision": ("model.vision.",),
    "connector": ("model.connector.",),
    "text": ("model.text.", "model.head."),
}
INNER = re.compile(r"\.layers\.|\.connector\.")  # neither the first nor the last matrix of a path: those are AdamW's
RATE = "rate"  # what a group multiplies the learning rate of the step with


def build_optimizers(module: nn.Module, options: Optimizer) -> list[torch.optim.Optimizer]:
    """One optimizer, or two for `muon`, over all parameters; weight decay for matrices only, not for norms, biases and
    embeddings.

    Raises ValueError where `adamw8bit` is asked for and bitsandbytes is not installed.
    """
    linears = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Linear)}
    inner = {id(p) for name, p in module.named_parameters() if id(p) in linears and INNER.search(name)}
    by_muon = inner if options.kind == "muon" else set()
    rest = [p for p in module.parameters() if id(p) not in by_muon]
    groups = [
        {"params": [p for p in rest if id(p) in linears], "weight_decay": options.weight_decay, RATE: 1.0},
        {"params": [p for p in rest if id(p) not in linears], "weight_decay": 0.0, RATE: 1.0},
    ]
    if options.kind == "adamw8bit":
        return [_eight_bit(groups, options)]
    adamw = torch.optim.AdamW(groups, betas=options.betas, fused=True)
    if not by_muon:
        return [adamw]
    matrices = [p for p in module.parameters() if id(p) in by_muon]
    group = {"params": matrices, RATE: options.muon_rate}
    return [torch.optim.Muon([group], weight_decay=options.weight_decay / options.muon_rate), adamw]


def _eight_bit(groups: list[dict[str, object]], options: Optimizer) -> torch.optim.Optimizer:
    # It would tell everybody that a kernel for 4-bit inference is missing, which training does not use.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError as error:
        raise ValueError("optimizer.kind adamw8bit needs bitsandbytes; install it: pip install bitsandbytes") from error
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, betas=options.betas)  # type: ignore[no-untyped-call]
    return optimizer


def learning_rate(stage: Stage, step: int) -> float:
    """The rate of optimizer step `step` (from 0) of a stage: linear warm-up, then half a cosine from first to last."""
    first, last = stage.learning_rate
    if step < stage.warmup_steps:
        return first * (step + 1) / stage.warmup_steps
    progress = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group[RATE]


def freeze(module: nn.Module, parts: Iterable[Part]) -> None:
    """Train everything but `parts`; a frozen part gets no gradients, and the optimizer leaves it as it is."""
    prefixes = tuple(prefix for part in parts for prefix in PARTS[part])
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not name.startswith(prefixes) if prefixes else True)
