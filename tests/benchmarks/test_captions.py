"""The benchmark runs and ends with its JSON line; its figures are not judged here."""

import sys

import pytest
from smoke import smoke_report


def test_every_side_captions_every_picture() -> None:
    report = smoke_report("captions.py", timeout_s=150, OMP_NUM_THREADS="1")
    assert report["peers"].keys() == {"transformers"}
    assert report["ratio"]["transformers"] == pytest.approx(report["ours"] / report["peers"]["transformers"], abs=1e-2)
    assert all(seconds > 0 for side in report["details"].values() for seconds in (side["single_s"], side["first_s"]))


def test_a_side_that_ends_says_so() -> None:
    with pytest.raises(AssertionError, match="ended; what it printed stands above"):
        smoke_report("captions.py", "--vllm-python", sys.executable, timeout_s=150, OMP_NUM_THREADS="1")
