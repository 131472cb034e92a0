"""A short soak: workers, a node and a driver are lost, and no row is lost, doubled or wrong."""

import pytest
from smoke import smoke_report


@pytest.mark.timeout(900)
def test_every_row_outlives_workers_a_node_and_a_driver() -> None:
    report = smoke_report("faults.py", timeout_s=880)
    assert report["strikes"] == {"worker": 2, "node": 1, "driver": 1}
    assert report["rows"] == report["images"] == 300
    assert (report["lost"], report["doubled"], report["wrong"], report["unreadable_files"]) == (0, 0, 0, 0)
    assert 0 < report["resumed"] < 300
    assert report["answers"] >= 294  # of six broken images there is none
