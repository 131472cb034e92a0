"""The benchmark runs and ends with its JSON line; its figures are not judged here."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from smoke import smoke_report

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import captions


def test_every_side_captions_every_picture() -> None:
    report = smoke_report("captions.py", timeout_s=450, OMP_NUM_THREADS="1")
    assert report["peers"].keys() == {"transformers"}
    assert report["ratio"]["transformers"] == pytest.approx(report["ours"] / report["peers"]["transformers"], abs=1e-2)
    assert all(seconds > 0 for side in report["details"].values() for seconds in (side["single_s"], side["first_s"]))


def test_integers_are_a_side_of_ours_and_no_peer() -> None:
    def side(batch_s: float, first_s: float) -> SimpleNamespace:
        return SimpleNamespace(seconds={"batch": [batch_s], "single": [1.0], "first": [first_s]})

    sides: Any = {"ours": side(8.0, 3.0), "transformers": side(16.0, 6.0), "int8": side(4.0, 1.5)}
    found = captions.report(sides, captions.parse(["--batch", "16", "--int8"]))
    assert found["ratio"] == found["first_token_ratio"] == {"transformers": 2.0}
    assert found["int8"] == {"ratio": {"transformers": 4.0}, "first_token_ratio": {"transformers": 4.0}}


def test_a_side_that_ends_says_so() -> None:
    with pytest.raises(AssertionError, match="ended; what it printed stands above"):
        smoke_report("captions.py", "--vllm-python", sys.executable, timeout_s=450, OMP_NUM_THREADS="1")
