import sys
import time
from pathlib import Path

import pytest
import torch

from smolvlm.cpu.threads import release_threads


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_helpers_go_and_come_back() -> None:
    """Where OpenMP cannot be asked, they would stay."""
    values = torch.ones(1 << 20)
    torch.set_num_threads(6)
    expected = torch.sqrt(values)
    before = _threads()
    release_threads()
    deadline = time.monotonic() + 60
    while before - _threads() < 5:  # they end by themselves, soon after they were told
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert torch.equal(torch.sqrt(values), expected)


def _threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))
