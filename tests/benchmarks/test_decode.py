"""The benchmark runs and ends with its JSON line; its figures are not judged here."""

import pytest
from smoke import smoke_report


def test_decode_runs() -> None:
    report = smoke_report("decode.py", timeout_s=550, OMP_NUM_THREADS="1")
    details = report["details"]
    assert report["ratio"] == pytest.approx(details["step_ms"]["eager"] / details["step_ms"]["graph"], abs=1e-3)
    assert report["ours"] == pytest.approx(3e3 / details["step_ms"]["graph"], abs=0.1)
    assert set(details["attention_ms"]) == {"graph", "eager"}
    assert details["limit_ms"] > 0
