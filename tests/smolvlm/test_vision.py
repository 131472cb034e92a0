import torch
from torch.nn import functional as F

from smolvlm.config import ImageConfig, VisionConfig
from smolvlm.vision import PatchEmbedding, VisionEncoder

# 22 = 2 * 8 + 6: the border of 6 pixels makes no patch, as 384 = 27 * 14 + 6 in the 2.2B model.
VISION = VisionConfig(
    image_size=22,
    patch_size=8,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_channels=3,
    layer_norm_eps=1e-6,
)
IMAGE = ImageConfig(tile_size=22, longest_edge=44, do_image_splitting=True, mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2))


def _tiles(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 22, 22, 3), dtype=torch.uint8, generator=generator)


def test_patches_are_those_of_a_convolution_over_normalised_pixels() -> None:
    embedding = PatchEmbedding(VISION, IMAGE)
    tiles = _tiles(3)
    mean, std = (torch.tensor(channels).view(1, 3, 1, 1) for channels in (IMAGE.mean, IMAGE.std))
    pixels = (tiles.permute(0, 3, 1, 2) / 255 - mean) / std
    kernel = embedding.projection.weight.view(16, 3, 8, 8)
    expected = F.conv2d(pixels, kernel, embedding.projection.bias, stride=8).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embedding(tiles), expected + embedding.positions.weight)


def test_a_tile_does_not_depend_on_its_batch() -> None:
    encoder = VisionEncoder(VISION, IMAGE).eval()
    tiles = _tiles(5)
    together = encoder(tiles)
    assert together.shape == (5, 4, 16)
    for index in range(5):
        torch.testing.assert_close(encoder(tiles[index : index + 1])[0], together[index])


def test_gradients_reach_every_parameter() -> None:
    encoder = VisionEncoder(VISION, IMAGE)
    encoder(_tiles(1)).square().sum().backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []
