"""Batches of examples of similar length, in an order that follows from the seed and the step alone."""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from smolvlm.training.examples import NO_TARGET, Draw, Example, ExampleMaker

WINDOW_STEPS = 8  # optimizer steps whose examples are drawn together and sorted by length


@dataclass(frozen=True)
class Batch:
    """B examples, padded to the longest of them.

    pixels uint8 [N, S, S, 3], the tiles of all; token_ids, labels and reading int64 [B, L]; image_positions int64 [M],
    where the image tokens stand in the flattened [B * L]; glyphs int64 [N, P, SLOTS], or [N, 0, 0] where unknown.
    """

    pixels: Tensor
    token_ids: Tensor
    labels: Tensor
    reading: Tensor
    image_positions: Tensor
    glyphs: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})

    def pin_memory(self) -> Batch:
        """The same in memory that a GPU copies from by itself; the data loader's thread calls it."""
        return Batch(**{name: value.pin_memory() for name, value in vars(self).items()})


def collate(examples: list[Example], image_token_id: int) -> Batch:
    """Pad at the end: with causal attention nothing that counts sees the padding."""
    length = max(len(example.token_ids) for example in examples)
    token_ids = _padded([example.token_ids for example in examples], length, 0)
    return Batch(
        pixels=torch.from_numpy(np.concatenate([example.tiles.pixels for example in examples])),
        token_ids=token_ids,
        labels=_padded([example.labels for example in examples], length, NO_TARGET),
        reading=_padded([example.reading for example in examples], length, NO_TARGET),
        image_positions=(token_ids.flatten() == image_token_id).nonzero().squeeze(1),
        glyphs=torch.from_numpy(np.concatenate([example.glyphs for example in examples])),
    )


def _padded(rows: list[np.ndarray], length: int, filler: int) -> Tensor:
    padded = np.full((len(rows), length), filler, np.int64)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(padded)


@dataclass(frozen=True)
class Share:
    """Which part of the data one process takes: process `rank` of `world`, `batch_size` examples a step over all,
    its own part in `micro_batches` pieces."""

    rank: int
    world: int
    batch_size: int
    micro_batches: int

    def __post_init__(self) -> None:
        if self.batch_size % (self.world * self.micro_batches):
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of processes ({self.world}) × micro_batches "
                f"({self.micro_batches}); choose one that is"
            )


Window = list[list[Batch]]


class Windows(Dataset[Window | ValueError]):
    """Window w → its steps, each a list of micro-batches of this process.

    A window's examples are sorted by length and cut into micro-batches, which are then shuffled: little padding, and
    no step of short examples only follows another. Every process draws only its own examples.
    """

    def __init__(self, draw: Draw, make: ExampleMaker, share: Share, num_examples: int | None, seed: int) -> None:
        self.draw, self.make, self.share, self.seed = draw, make, share, seed
        self.num_examples = num_examples

    def __getitem__(self, window: int) -> Window | ValueError:
        """The window, or what is wrong with one of its examples: raised in a data worker, the error would arrive with
        that worker's traceback in its message."""
        try:
            return self._steps(window)
        except ValueError as error:
            return ValueError(str(error))

    def _steps(self, window: int) -> Window:
        share, rng = self.share, np.random.default_rng((self.seed, window, self.share.rank))
        examples = [self.make(self.draw(index)) for index in self._indices(window)]
        order = sorted(range(len(examples)), key=lambda index: len(examples[index].token_ids))
        size = share.batch_size // share.world // share.micro_batches
        groups = [order[start : start + size] for start in range(0, len(order), size)]
        rng.shuffle(groups)
        image_token_id = self.make.config.image_token_id
        batches = [collate([examples[index] for index in group], image_token_id) for group in groups]
        return [batches[start : start + share.micro_batches] for start in range(0, len(batches), share.micro_batches)]

    def _indices(self, window: int) -> Iterator[int]:
        """Generators have no end; a source is gone through in a new order each time."""
        share = self.share
        count = WINDOW_STEPS * share.batch_size
        for place in range(window * count + share.rank, (window + 1) * count, share.world):
            if self.num_examples is None:
                yield place
            else:
                epoch, index = divmod(place, self.num_examples)
                yield int(np.random.default_rng((self.seed, epoch)).permutation(self.num_examples)[index])


def steps(windows: Windows, first: int, last: int, workers: int, pin: bool = False) -> Iterator[list[Batch]]:
    """The micro-batches of steps first..last-1, drawn ahead by `workers` processes (0: in this one), for a GPU pinned.

    Raises ValueError, naming the example, when the step is reached whose window holds a bad one.
    """
    begin, end = first // WINDOW_STEPS, -(-last // WINDOW_STEPS)
    loader = DataLoader(
        windows,
        batch_size=None,
        sampler=range(begin, end),
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
        prefetch_factor=2 if workers else None,
        worker_init_fn=_end_at_once if workers else None,
        pin_memory=pin,
    )
    with _interrupts_ignored():
        windows_in_order = iter(loader)
    step = begin * WINDOW_STEPS
    for window in windows_in_order:
        if isinstance(window, ValueError):
            raise window
        for micro_batches in window:
            if first <= step < last:
                yield micro_batches
            step += 1


def _end_at_once(_: int) -> None:
    """A data worker that is told to end may still be sending tensors from a second thread, and an interpreter that goes
    away under it aborts."""
    atexit.register(os._exit, 0)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes started inside never see Ctrl-C, which a terminal sends to all: this one decides when to stop."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set signals, and only its process runs at a terminal
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
