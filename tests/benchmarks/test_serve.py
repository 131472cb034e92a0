"""The benchmark runs and ends with its JSON line; its figures are not judged here."""

import pytest
from smoke import smoke_report


@pytest.mark.timeout(600)
def test_serve_runs() -> None:
    report = smoke_report("serve.py", timeout_s=580, RAY_AUTH_MODE="disabled", OMP_NUM_THREADS="1")
    assert report["ratio"] == pytest.approx(report["ours"] / report["peer"], abs=1e-2)
    ours = report["details"]["ours"]
    assert 0 < ours["overhead_ms"]["gateway_50"] < ours["overhead_ms"]["total_50"]
    assert ours["first_token_s"]["idle"]["requests"] == 3
    assert all(speed > 0 for speed in ours["batch_tokens_per_s"].values())
