"""SigLIP vision encoder: one tile in, one vector per patch out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smolvlm.config import ImageConfig, VisionConfig
from smolvlm.dense_attention import dense_attention


class PatchEmbedding(nn.Module):
    """uint8 tiles [N, S, S, C] → patch vectors [N, P, H] with learned positions.

    The tile is normalised here, on the device: tiles travel as bytes. A convolution whose stride equals its kernel is
    one matrix product over the flattened patches. Every tile is full-size, so the positions are always arange(P); a
    border narrower than a patch (384 = 27 * 14 + 6) is left out, as a convolution without padding does.

    Source: transformers Idefics3VisionEmbeddings.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: VisionConfig, image: ImageConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.grid = config.image_size // config.patch_size
        patch_dim = config.num_channels * config.patch_size**2
        self.projection = nn.Linear(patch_dim, config.hidden_size)
        self.positions = nn.Embedding(config.num_patches, config.hidden_size)
        self.image = image
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Compute the normalisation constants, float32 [C * p * p] each, on the device of the weights."""
        for name, channels in (("mean", self.image.mean), ("std", self.image.std)):
            values = torch.tensor(channels, dtype=torch.float32, device=self.positions.weight.device)
            self.register_buffer(name, values.repeat_interleave(self.patch_size**2), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.cut(pixels).to(torch.float32)
        values = patches.div_(255.0).sub_(self.mean).div_(self.std)
        embedded: Tensor = self.projection(values.to(self.positions.weight.dtype))
        return embedded + self.positions.weight

    def cut(self, pixels: Tensor) -> Tensor:
        """[N, S, S, C] → [N, grid * grid, C * p * p], channel-major inside a patch as the convolution weight is."""
        n, size, grid = self.patch_size, self.grid * self.patch_size, self.grid
        tiles = pixels[:, :size, :size]  # [N, grid * p, grid * p, C]
        tiles = tiles.unflatten(2, (grid, n)).unflatten(1, (grid, n))  # [N, gy, py, gx, px, C]
        return tiles.permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2)


class VisionAttention(nn.Module):
    """Full self-attention inside a tile, no mask. Source: transformers Idefics3VisionAttention."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.qkv: nn.Module = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.output: nn.Module = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        qkv = self.qkv(hidden).unflatten(-1, (3, self.num_heads, self.head_dim))  # [N, P, 3, heads, D]
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # [N, heads, P, D] each
        attended = dense_attention(q, k, v)
        output: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return output


class VisionMLP(nn.Module):
    """Two linears around a tanh-GELU. Source: transformers Idefics3VisionMLP."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.up: nn.Module = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation: nn.Module = nn.GELU(approximate="tanh")
        self.down: nn.Module = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.down(self.activation(self.up(hidden)))
        return output


class VisionLayer(nn.Module):
    """Pre-norm transformer block. Source: transformers Idefics3EncoderLayer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = VisionAttention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden))
        return hidden + self.mlp(self.mlp_norm(hidden))


class VisionEncoder(nn.Module):
    """uint8 tiles [N, S, S, C] → [N, P, H], after the final LayerNorm.

    Source: transformers Idefics3VisionTransformer.
    """

    def __init__(self, config: VisionConfig, image: ImageConfig) -> None:
        super().__init__()
        self.embedding = PatchEmbedding(config, image)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.embedding(pixels)
        for layer in self.layers:
            hidden = layer(hidden)
        normed: Tensor = self.norm(hidden)
        return normed
