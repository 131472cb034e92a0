"""Run one job from this process: join or start Ray, execute, drain on the first interrupt."""

import logging
import os
import secrets
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError
from pipeline.job import Job, Model
from smolvlm.hub import resolve_checkpoint

if TYPE_CHECKING:
    from jobs.progress import Display
    from pipeline.run import Summary

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STOPPING = "stopping: images under way are finished and committed; interrupt again to abort"


def execute(job: Job, display: "Display", address: str | None = None) -> "Summary":
    """Run `job` on the Ray cluster at `address`, or on this machine if None.

    The first SIGINT or SIGTERM lets work under way finish and commits it (Summary.interrupted); the second raises
    KeyboardInterrupt. Raises pipeline.errors.PipelineError for what a user can cause.
    """
    from pipeline.run import check_destination, run

    check_destination(job)
    fetch_checkpoint(job.model)
    drain = threading.Event()
    with ray_session(address), draining(drain, display.say, _STOPPING):
        return run(job, on_progress=display, drain=drain, say=display.say)


def fetch_checkpoint(model: Model) -> None:
    """Have the checkpoint on this machine before anything starts. Raises ConfigError if it cannot be had."""
    try:
        resolve_checkpoint(model.id, model.revision)
    except (OSError, ValueError) as error:  # the hub client's own errors are OSErrors
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = "check the name, the network and HF_TOKEN, or give the directory of a checkpoint"
        raise ConfigError(f"model.id {model.id}: {reason}; {remedy}") from error


@contextmanager
def ray_session(address: str | None = None) -> Iterator[None]:
    """Connect to the cluster at `address`, or start a local Ray, for the length of the block; keep one that runs here.

    A local Ray has no dashboard, asks every client for a token made for this session and reports no statistics.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None and "ray" not in sys.modules:  # Ray reads these once per process
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    _quieten_ray_data()
    if ray.is_initialized():
        yield
        return
    include_dashboard = False if address is None else None
    ray.init(
        address=address or "local",
        include_dashboard=include_dashboard,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def draining(drain: threading.Event, say: Callable[[str], None], message: str = "") -> Iterator[None]:
    """Set `drain` and say `message` on the first SIGINT or SIGTERM inside the block, raise KeyboardInterrupt on the
    second."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        if drain.is_set():
            raise KeyboardInterrupt
        drain.set()
        say(message)

    before = {number: signal.signal(number, on_signal) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _quieten_ray_data() -> None:
    """Leave the terminal to our own display; Ray Data's log file still gets everything."""
    import ray.data
    from ray.util.annotations import RayDeprecationWarning

    assert ray.data is not None  # importing it puts up the handlers
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.ERROR)
    warnings.simplefilter("ignore", RayDeprecationWarning)
