"""The benchmark runs and ends with its JSON line; its figures are not judged here."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from smoke import ROOT, smoke_report

from smolvlm.config import ModelConfig
from smolvlm.scratch import create_checkpoint

sys.path.append(str(ROOT / "benchmarks"))  # last: a file there is named like the package `pipeline`

from measuring.limits import Load, Rates, limit_seconds, tile_work


def test_engine_runs(tmp_path: Path) -> None:
    plot = tmp_path / "engine.png"
    report = smoke_report("engine.py", "--tiles", "5", "--plot", str(plot), timeout_s=450, OMP_NUM_THREADS="1")
    assert [each["batch"] for each in report["batches"]] == [1, 2]
    for each in report["batches"]:
        assert each["ratio"] == pytest.approx(each["ours"] / each["peer"], abs=1e-3)
        assert each["share"] == pytest.approx(each["ours"] / each["limit"], abs=1e-3)
        assert each["same_tokens"] == 1.0
        assert set(each["details"]) == {"ours", "transformers"}
        for side in each["details"].values():
            assert side["first_token_s"] > 0
            assert all(seconds > 0 for seconds in side["phase_s"].values())
            assert side["overlap"] <= 0  # a CPU does one thing at a time
    assert report["ours"] == report["batches"][-1]["ours"]
    with Image.open(plot) as drawn:
        assert drawn.width > 500


def test_the_limits_are_those_of_the_architecture(tmp_path: Path) -> None:
    """A tile of 256M takes 215 GFLOP; a token's keys and values take 23,040 bytes in bfloat16."""
    small = create_checkpoint(tmp_path / "256m", "256m", num_text_layers=1, num_vision_layers=1, dtype="bfloat16")
    config = ModelConfig.from_pretrained(small)
    config = replace(config, text=replace(config.text, num_layers=30), vision=replace(config.vision, num_layers=12))
    tile = tile_work(config)
    assert tile.blocks + tile.others == pytest.approx(215e9, rel=0.02)
    assert tile.blocks == 2 * 1024 * 12 * 12 * 768**2
    slow = Rates(blocks=1e30, flops=1e30, bytes=1e9)
    short, long = (
        limit_seconds(config, Load(16, 1, prompt, 2), torch.bfloat16, slow)["decode"] for prompt in (100, 1100)
    )
    assert long - short == pytest.approx(16 * 1000 * 23040 / 1e9)
    assert short - 16 * 100.5 * 23040 / 1e9 == pytest.approx(0.27, rel=0.02)  # the text model and its head, read once
    prompt, rounded = Load(16, 1, 100, 2), {"in_int8": True}
    quick, apart = (limit_seconds(config, prompt, torch.bfloat16, slow, **each)["decode"] for each in ({}, rounded))
    assert quick - apart == pytest.approx(106.2e6 / 1e9, rel=0.01)  # the weights of the blocks take half


def test_8_bit_weights_have_a_limit_of_their_own() -> None:
    report = smoke_report("engine.py", "--quantization", "int8", timeout_s=450, OMP_NUM_THREADS="1")
    assert report["setting"]["quantization"] == "int8"
    assert report["rates"]["blocks_per_s"] != report["rates"]["flops_per_s"]
