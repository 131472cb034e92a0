"""Seconds of work on a device that may run behind the host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def now(device: torch.device) -> float:
    """The time when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median of several runs, after one that compiles and fills caches."""

    def once() -> float:
        start = now(device)
        work()
        return now(device) - start

    once()
    return statistics.median(once() for _ in range(repeats))
