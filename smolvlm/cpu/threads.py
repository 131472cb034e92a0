"""Threads that OpenMP keeps ready for whoever computed with them."""

from __future__ import annotations

import ctypes

SOFT = 1  # omp_pause_soft: they come back when they are needed


def release_threads() -> None:
    """Give back those of the calling thread, if OpenMP is here: libgomp counts them, and lets the helpers of another
    thread sleep after every step of work instead of waiting for the next if both are more than there are cores.

    Measured with two cores: what takes 0.14 s takes 0.42 s in a second thread, and 0.14 to 0.15 s after this.
    """
    pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)  # torch loads OpenMP for everyone
    if pause is not None:
        pause(SOFT)
