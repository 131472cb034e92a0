"""The benchmark runs and ends with its JSON line; its figures are not judged here."""

import pytest
from smoke import smoke_report


@pytest.mark.timeout(580)
def test_end_to_end_runs() -> None:
    report = smoke_report("end_to_end.py", timeout_s=560)
    assert set(report["standin"]) == {"ours", "ray_read_webdataset", "plain_loop"}
    assert set(report["engine"]) == {"ours", "plain_loop"}
    assert report["ours"] > 0
    assert report["peer"] > 0
