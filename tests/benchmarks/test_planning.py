"""The benchmark runs and ends with its JSON line; its figures are not judged here."""

import pytest
from smoke import smoke_report


@pytest.mark.timeout(800)
def test_planning_runs() -> None:
    report = smoke_report("planning.py", timeout_s=780)
    assert report["objects"] == 3000
    assert set(report["cases"]) == {"plan", "manifest", "run"}
    for rows in report["cases"].values():
        assert set(rows) == {"300", "3000"}
        assert all(row["seconds"] > 0 and row["peak_mb"] > 50 for row in rows.values())
    assert report["plan_s"] == report["cases"]["plan"]["3000"]["seconds"]
    for case, growth in report["memory_growth"].items():
        small, large = (report["cases"][case][objects]["peak_mb"] for objects in ("300", "3000"))
        assert growth == pytest.approx(large / small, abs=1e-3)
