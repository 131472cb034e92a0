"""The checks of one node, and that they try what a run does; on a cluster they are tried in test_submit.py."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.preflight import check_memory, check_node_gpus, check_versions
from jobs.preflight_node import Inspector, facts
from pipeline.job import EngineOptions, Model

ON_CPU = EngineOptions()


def test_other_versions_are_named() -> None:
    here = facts()
    there = replace(here, versions={**here.versions, "torch": "1.0", "smolvlm-pipeline": "not installed"})
    assert check_versions("n", here, here).passed
    check = check_versions("n", here, there)
    assert not check.passed
    assert check.found.startswith(f"torch 1.0, the driver has {here.versions['torch']}; smolvlm-pipeline not inst")
    assert re.fullmatch(r"\d+\.\d+\.\d+", here.versions["python"])


def test_memory_has_to_be_enough_and_shared() -> None:
    assert check_memory("n", 2 << 30, 2 << 30).passed
    assert "--object-store-memory" in check_memory("n", 1 << 20, 2 << 30).remedy
    assert not check_memory("n", 2 << 30, 64 << 20).passed
    assert "--shm-size" in check_memory("n", 2 << 30, 64 << 20).remedy


def test_gpus_that_ray_does_not_know_are_told() -> None:
    assert check_node_gpus("n", 4.0, 4).passed
    assert not check_node_gpus("n", 0.0, 4).passed
    assert "--num-gpus" in check_node_gpus("n", 0.0, 4).remedy


def test_an_engine_is_made_as_the_run_will_make_it(tiny_checkpoint: Path) -> None:
    """The sizes of this checkpoint are not those that products of 8-bit integers take: its weights alone would load."""
    model = Model(str(tiny_checkpoint), kv_cache_dtype="fp8")
    assert Inspector().make_engine(model, ON_CPU) > 0
    with pytest.raises(ValueError, match="quantization 'int8'"):
        Inspector().make_engine(replace(model, quantization="int8"), ON_CPU)
