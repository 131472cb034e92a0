"""The benchmark runs and ends with its JSON line; its figures are not judged here."""

import pytest
from smoke import smoke_report


@pytest.mark.timeout(600)
def test_scaling_runs() -> None:
    report = smoke_report("scaling.py", timeout_s=580)
    assert [row["nodes"] for row in report["clusters"]] == [1, 2]
    assert [row["limit"] for row in report["clusters"]] == [100, 200]
    for row in report["clusters"]:
        assert 0 < row["images_per_s"] <= row["limit"] * 1.02  # nothing is faster than the engines sleep
    assert report["ours"] == report["clusters"][-1]["efficiency"]
