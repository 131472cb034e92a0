from pathlib import Path

import pytest
from mixed_source import write_mixed


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    return write_mixed(tmp_path / "mixed")
