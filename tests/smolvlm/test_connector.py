import torch

from smolvlm.connector import pixel_shuffle


def test_pixel_shuffle_joins_neighbours_row_by_row() -> None:
    side, scale, hidden = 6, 3, 2
    patches = torch.arange(2 * side * side * hidden).view(2, side * side, hidden)
    grid = patches.view(2, side, side, hidden)
    blocks = [
        torch.cat([grid[:, by * scale + y, bx * scale + x] for y in range(scale) for x in range(scale)], dim=-1)
        for by in range(side // scale)
        for bx in range(side // scale)
    ]
    assert torch.equal(pixel_shuffle(patches, scale), torch.stack(blocks, dim=1))
