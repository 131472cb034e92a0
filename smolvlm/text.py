"""Llama text decoder over packed tokens [T, H]: RMSNorm, rotary positions, grouped-query attention, gated MLP."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smolvlm.attention import Attention
from smolvlm.config import TextConfig


class TextAttention(nn.Module):
    """Grouped-query attention with rotary positions. Source: transformers LlamaAttention."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.qkv = nn.Linear(config.hidden_size, (self.num_heads + 2 * self.num_kv_heads) * self.head_dim, bias=False)
        self.output = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, layer: int, rotary: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        heads = self.qkv(hidden).unflatten(-1, (-1, self.head_dim))  # [T, heads + 2 * kv_heads, D]
        qk, v = heads.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1)
        q, k = rotate(qk, *rotary).split([self.num_heads, self.num_kv_heads], dim=1)
        kv = torch.stack([k, v], dim=1)  # [T, 2, kv_heads, D]
        return self.output(attention.attend(layer, q, kv).flatten(1))


class TextMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one product. Source: transformers LlamaMLP."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class TextLayer(nn.Module):
    """Pre-norm transformer block. Source: transformers LlamaDecoderLayer."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = TextAttention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = TextMLP(config)

    def forward(self, hidden: Tensor, layer: int, rotary: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden), layer, rotary, attention)
        return hidden + self.mlp(self.mlp_norm(hidden))


class TextDecoder(nn.Module):
    """Embeddings [T, H] → hidden states [T, H] after the final norm. Source: transformers LlamaModel."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TextLayer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.config = config
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Compute the rotary table, [max_positions, D] each, on the device and in the dtype of the weights."""
        for name, table in zip(("cos", "sin"), rotary_table(self.config), strict=True):
            self.register_buffer(name, table.to(self.embedding.weight), persistent=False)

    def forward(self, embeddings: Tensor, attention: Attention) -> Tensor:
        rotary = self.cos[attention.positions].unsqueeze(1), self.sin[attention.positions].unsqueeze(1)  # [T, 1, D]
        hidden = embeddings
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, index, rotary, attention)
        normed: Tensor = self.norm(hidden)
        return normed


def rotary_table(config: TextConfig) -> tuple[Tensor, Tensor]:
    """cos and signed sin of every position, float32 [max_positions, D] each.

    The first half of sin is negated, which turns rotate_half of transformers' apply_rotary_pos_emb into a plain swap of
    halves (RoFormer, https://arxiv.org/abs/2104.09864).
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.outer(torch.arange(config.max_positions, dtype=torch.float32), 1.0 / config.rope_theta**exponents)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn heads [T, n, D] by their positions' cos and signed sin [T, 1, D]."""
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, dims=-1), sin)
