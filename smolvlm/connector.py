"""From the vision encoder to the text decoder: pixel shuffle, then one projection."""

from __future__ import annotations

from torch import Tensor, nn

from smolvlm.config import ModelConfig


class Connector(nn.Module):
    """Patch vectors [N, P, H_vision] → image token embeddings [N, P / s², H_text].

    Source: transformers Idefics3Connector.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.scale_factor = config.scale_factor
        shuffled = config.vision.hidden_size * config.scale_factor**2
        self.projection = nn.Linear(shuffled, config.text.hidden_size, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        projected: Tensor = self.projection(pixel_shuffle(patches, self.scale_factor))
        return projected


def pixel_shuffle(patches: Tensor, scale: int) -> Tensor:
    """Join each scale × scale block of neighbouring patches into one vector: [N, P, H] → [N, P / s², s² * H].

    Inside a block the patches follow each other row by row, each with its H channels together
    (torch.pixel_unshuffle orders them channel by channel: not the same).
    """
    num_tiles, num_patches, hidden_size = patches.shape
    side = int(num_patches**0.5) // scale
    blocks = patches.view(num_tiles, side, scale, side, scale, hidden_size)  # [N, by, y, bx, x, H]
    return blocks.transpose(2, 3).reshape(num_tiles, side * side, scale * scale * hidden_size)
