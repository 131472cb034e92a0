import os
import signal
import threading
import warnings
from pathlib import Path

import pytest

from jobs.run import draining, fetch_checkpoint, ray_session
from pipeline.errors import ConfigError
from pipeline.job import Model
from smolvlm import hub


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_drains_and_the_second_aborts(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    drain, said = threading.Event(), list[str]()
    with draining(drain, said.append, "stopping: interrupt again to abort"):
        os.kill(os.getpid(), number)
        assert drain.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert said == ["stopping: interrupt again to abort"]
    assert signal.getsignal(number) is before


def test_a_block_without_signals_changes_nothing() -> None:
    before, drain = signal.getsignal(signal.SIGINT), threading.Event()
    with draining(drain, print):
        pass
    assert signal.getsignal(signal.SIGINT) is before
    assert not drain.is_set()


def test_a_ray_that_runs_here_is_used_and_left_running(ray_cluster: str) -> None:
    import ray

    with warnings.catch_warnings(), ray_session():
        assert ray.get_runtime_context().gcs_address == ray_cluster
    assert ray.is_initialized()


def test_a_checkpoint_that_cannot_be_had_is_a_config_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    fetch_checkpoint(Model(str(tiny_checkpoint)))
    monkeypatch.setattr(hub, "BUNDLED_DIRECTORY", tmp_path)
    with pytest.raises(ConfigError, match="carries no checkpoint"):
        fetch_checkpoint(Model("bundled"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"owner/model: .*HF_TOKEN"):
        fetch_checkpoint(Model("owner/model", "a" * 40))
