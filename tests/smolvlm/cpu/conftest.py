from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def threads_given_back() -> Iterator[None]:
    """A test may compute with another number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
