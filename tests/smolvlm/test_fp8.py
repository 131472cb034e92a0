"""The encoder in 8-bit floats: products against their definition, and the bundled model's real weights through it."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from smolvlm.fp8 import Fp8Linear, check_fp8, quantize_encoder, quantized_rows
from smolvlm.hub import BUNDLED_DIRECTORY
from smolvlm.model import SmolVLM
from smolvlm.precision import E4M3
from smolvlm.processor import Processor
from smolvlm.training.documents import DocumentGenerator
from smolvlm.vision import VisionLayer

CPU = torch.device("cpu")
PROMPT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Transcribe all text."}]}]
MOST_ERROR = 0.08  # of the norm of a tile's features


@pytest.fixture(scope="module", autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def test_the_largest_of_a_row_is_448_and_no_value_is_off_by_more_than_a_sixteenth() -> None:
    values = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-3, 4).view(7, 1)
    rounded, scales = quantized_rows(values)
    assert (rounded.dtype, scales.shape) == (E4M3, (3, 7, 1))
    assert (rounded.float().abs().amax(-1) == 448).all()
    smallest_step = scales * 2.0**-10  # half of the distance between the smallest two
    assert ((rounded.float() * scales - values).abs() <= (values.abs() / 16).maximum(smallest_step) * 1.0001).all()


def test_a_row_of_zeros_stays_one() -> None:
    rounded, _ = quantized_rows(torch.zeros(2, 16))
    assert torch.equal(rounded.float(), torch.zeros(2, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_the_product_of_what_was_rounded(dtype: torch.dtype) -> None:
    linear, inputs = nn.Linear(48, 32).to(dtype), torch.randn(2, 5, 48).to(dtype)
    (x, x_scales), (weight, weight_scales) = quantized_rows(inputs), quantized_rows(linear.weight)
    expected = (x.float() * x_scales) @ (weight.float() * weight_scales).t() + linear.bias.float()
    found = Fp8Linear(linear)(inputs)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """torch's sums run in another order for another number of rows, hence the tolerance."""
    linear, inputs = Fp8Linear(nn.Linear(32, 16)), torch.randn(6, 32)
    inputs[3] *= 1e4
    torch.testing.assert_close(linear(inputs)[1:2], linear(inputs[1:2]))


def test_features_of_real_weights_stay_near_those_of_float32() -> None:
    exact, rounded = (SmolVLM.from_pretrained(BUNDLED_DIRECTORY) for _ in range(2))
    quantize_encoder(rounded)
    document = DocumentGenerator("held_out", 5).document(0)
    prepared = Processor.from_pretrained(BUNDLED_DIRECTORY)(PROMPT, [document.image])
    pixels = torch.from_numpy(prepared.tiles[0].pixels)
    expected, found = (model.encode_tiles(pixels) for model in (exact, rounded))
    assert 0 < (found - expected).norm() < MOST_ERROR * expected.norm()


def test_the_linear_layers_of_the_encoders_blocks_are_replaced_and_nothing_else() -> None:
    model = SmolVLM.from_pretrained(BUNDLED_DIRECTORY)
    text = {f"text.{name}" for name, each in model.text.named_modules() if isinstance(each, nn.Linear)}
    quantize_encoder(model)
    linears = {name for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    assert linears - text == {"vision.embedding.projection", "connector.projection", "head"}
    assert text < linears


def test_where_it_does_not_run_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"quantization is 'fp8' and device 'cuda:1'; .* 8\.9 or above: leave it out"):
        check_fp8(torch.device("cuda:1"), torch.bfloat16)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    check_fp8(torch.device("cuda:1"), torch.bfloat16)
    with pytest.raises(ValueError, match="dtype 'float32'; on cuda:1 it goes with bfloat16"):
        check_fp8(torch.device("cuda:1"), torch.float32)


def test_sizes_that_the_products_do_not_take_are_refused() -> None:
    model = SmolVLM.from_pretrained(BUNDLED_DIRECTORY)
    layer = model.vision.layers[0]
    assert isinstance(layer, VisionLayer)
    layer.mlp.up = nn.Linear(192, 760)
    with pytest.raises(ValueError, match="wants an encoder whose sizes are multiples of 16; leave it out"):
        quantize_encoder(model)
