import pytest
import torch
from torch import nn

from smolvlm.config import ImageConfig, VisionConfig
from smolvlm.packed import PackedLinear, can_pack, pack_linears
from smolvlm.vision import VisionEncoder

VISION = VisionConfig(
    image_size=16,
    patch_size=8,
    hidden_size=16,
    intermediate_size=40,
    num_layers=2,
    num_heads=2,
    num_channels=3,
    layer_norm_eps=1e-6,
)
IMAGE = ImageConfig(tile_size=16, longest_edge=32, do_image_splitting=True, mean=(0.5,) * 3, std=(0.5,) * 3)

needs_packing = pytest.mark.skipif(not can_pack(torch.float32), reason="torch without oneDNN")


@needs_packing
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (7, 24), (2, 5, 24), (300, 24)])
def test_a_packed_layer_computes_the_same(bias: bool, shape: tuple[int, ...]) -> None:
    linear, inputs = nn.Linear(24, 33, bias=bias), torch.randn(shape)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(linear)(inputs), linear(inputs))
        expected = nn.functional.gelu(linear(inputs), approximate="tanh")
        torch.testing.assert_close(PackedLinear(linear, gelu=True)(inputs), expected, atol=1e-5, rtol=1e-4)


@needs_packing
def test_a_packed_encoder_computes_the_same_and_has_no_linear_left() -> None:
    encoder = VisionEncoder(VISION, IMAGE).eval()
    tiles = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)
    with torch.inference_mode():
        expected = encoder(tiles)
        pack_linears(encoder)
        torch.testing.assert_close(encoder(tiles), expected, atol=1e-5, rtol=1e-4)
    assert not any(isinstance(module, nn.Linear) for module in encoder.modules())


def test_half_precision_is_left_alone() -> None:
    assert not can_pack(torch.float16)
