"""The benchmark runs and ends with its JSON line; its figures are not judged here."""

import pytest
from smoke import smoke_report


@pytest.mark.timeout(800)
def test_three_sources_are_planned_and_run() -> None:
    report = smoke_report("plan.py", timeout_s=780)
    assert set(report["sources"]) == {"photos", "documents", "words"}
    for name, row in report["sources"].items():
        assert row["images"] == 40
        assert row["ratio"] == pytest.approx(row["planned_s"] / row["measured_s"], rel=0.05)
        assert report["ratios"][name] == row["ratio"]
        assert row["planned_interval_s"][0] <= row["planned_s"] <= row["planned_interval_s"][1]
        assert row["measured_tokens"] > 0
