"""Waiting for what another thread, process or machine does."""

import time
from collections.abc import Callable

_LOOK_EVERY_S = 0.05


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    """Return once the condition holds; fail if it does not within so many seconds, far more than it takes."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(_LOOK_EVERY_S)
