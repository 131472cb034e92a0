from pathlib import Path

import pytest
import torch

from smolvlm import Engine
from smolvlm.fp8 import Fp8Linear
from smolvlm.hub import BUNDLED_DIRECTORY
from smolvlm.model import SmolVLM
from smolvlm.quantization import check_quantization, quantize


def test_another_name_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match="quantization is 'int4'; it must be 'int8' or 'fp8', or left out"):
        Engine.from_pretrained("/no/such/place", quantization="int4")


def test_none_is_nothing_anywhere() -> None:
    check_quantization(None, torch.device("cuda"), torch.float16)
    model = SmolVLM.from_pretrained(BUNDLED_DIRECTORY)
    before = [type(each) for each in model.modules()]
    quantize(model, None)
    assert [type(each) for each in model.modules()] == before


def test_a_name_is_its_numbers() -> None:
    model = SmolVLM.from_pretrained(BUNDLED_DIRECTORY)
    quantize(model, "fp8")
    assert sum(isinstance(each, Fp8Linear) for each in model.modules()) == 4 * model.config.vision.num_layers


def test_each_has_its_own_demands(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="'int8' runs on a CPU in float32 or bfloat16, not on cpu in float16"):
        Engine.from_pretrained(tiny_checkpoint, dtype="float16", quantization="int8")
    with pytest.raises(ValueError, match="quantization is 'fp8' and dtype 'float16'; on cpu it goes with float32 or"):
        Engine.from_pretrained(tiny_checkpoint, dtype="float16", quantization="fp8")
