"""The comparison of training loops runs and ends with its JSON line; its figures are not judged here."""

import pytest
from smoke import ROOT, smoke_report


def test_both_train_the_same_model_on_the_same_batches() -> None:
    report = smoke_report(
        "training.py", "jobs/examples/train_overfit.yaml", timeout_s=560, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"
    )
    ours, theirs = (report["details"][name] for name in ("ours", "transformers"))
    # Before a step, and after one with the same gradient and optimizer.
    assert ours["first_losses"] == pytest.approx(theirs["first_losses"], rel=2e-3)
    assert ours["first_losses"][0] != ours["first_losses"][1]
    assert report["ratio"] == pytest.approx(report["ours"] / report["peer"], rel=1e-2)
    assert 0 < ours["percent_of_peak"] < 100
    assert report["parameters"] > 100_000
    assert report["gflop_per_sample"] > 0
