"""The paged key/value cache and three ways to attend to it: packed prefill, prefill behind a cached beginning, decode.

All offer `positions` and `attend`, which is all the text decoder knows of them; the fused decode of
smolvlm.kernels.paged_decode takes its place behind the same two names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from smolvlm.config import TextConfig
from smolvlm.cpu.attention import decode_attention
from smolvlm.precision import E4M3, to_e4m3


class Attention(Protocol):
    """How one forward pass of the text decoder reads and writes keys and values."""

    @property
    def positions(self) -> Tensor:
        """Position of each of the T packed tokens, int64 [T]."""

    def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """Queries [T, heads, D] and the new keys and values [T, 2, kv_heads, D] of a layer → attended [T, heads, D]."""


class KVCache:
    """Keys and values of all layers in fixed-size blocks; block 0..num_blocks-1 of `block_size` tokens each.

    Layout [layers, blocks, block_size, 2, kv_heads, D]: the keys and values of a token lie together, so one scatter
    writes them and one gather reads them. One block more, `scratch`, belongs to nobody: rows of a decode batch that are
    padding write there.

    With dtype e4m3 pages hold less than what is computed. Then every token attends to keys and values as pages hold
    them, its own and those of its own prefill too: an answer does not depend on what happened to be cached.
    """

    def __init__(
        self, config: TextConfig, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.block_size = block_size
        self.scratch = num_blocks
        self.token_shape = (2, config.num_kv_heads, config.head_dim)
        self.storage = _lazy_zeros((config.num_layers, num_blocks + 1, block_size, *self.token_shape), device, dtype)
        self._gathered = torch.empty(0, device=device, dtype=dtype)

    @staticmethod
    def block_bytes(config: TextConfig, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers."""
        return config.num_layers * block_size * 2 * config.num_kv_heads * config.head_dim * dtype.itemsize

    def write(self, layer: int, slots: Tensor, kv: Tensor) -> Tensor:
        """Store kv [T, 2, kv_heads, D] at slots [T] (slot = block * block_size + offset); give back what is stored."""
        stored = to_e4m3(kv) if self.storage.dtype == E4M3 else kv
        _movable(self.storage[layer]).flatten(0, 1).index_copy_(0, slots, _movable(stored))
        return stored.to(kv.dtype)

    def gather(self, layer: int, block_table: Tensor) -> Tensor:
        """Blocks [B, N] of a layer, side by side: [B, N * block_size, 2, kv_heads, D] in the dtype of the pages.

        The result is one buffer, overwritten by the next call: a fresh one of this size would cost more in page faults
        than the copy itself.
        """
        batch, num_blocks = block_table.shape
        blocks = self.storage[layer].flatten(1)  # [blocks, block_size * 2 * kv_heads * D]
        size = batch * num_blocks * blocks.shape[1]
        if self._gathered.numel() < size:
            self._gathered = torch.empty(size, device=blocks.device, dtype=blocks.dtype)
        buffer = self._gathered[:size].view(batch * num_blocks, blocks.shape[1])
        torch.index_select(blocks, 0, block_table.flatten(), out=buffer)
        return buffer.view(batch, num_blocks * self.block_size, *self.token_shape)


@dataclass(frozen=True)
class PackedPrefill:
    """Whole prompts one after the other, without padding; each attends causally to itself.

    cache None computes without storing (training, full recomputation); slots is then unused. With `starts` all prompts
    go through one kernel (`can_pack_sequences`), else one after the other.
    """

    lengths: tuple[int, ...]
    positions: Tensor  # int64 [T], T = sum(lengths)
    slots: Tensor  # int64 [T]
    cache: KVCache | None
    starts: Tensor | None = None  # int32 [n + 1], where each prompt starts, and T

    def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        if self.cache is not None:
            kv = self.cache.write(layer, self.slots, kv)
        k, v = kv.unbind(1)
        if self.starts is not None:
            return packed_attention(q, k, v, self.starts, max(self.lengths))
        parts = zip(*(tensor.split(self.lengths) for tensor in (q, k, v)), strict=True)
        return torch.cat([causal_attention(*part) for part in parts])


@dataclass(frozen=True)
class PagedPrefill:
    """The fresh tokens of prompts one after the other; each prompt attends causally to itself, its beginning in pages.

    `prefixes` has an entry a prompt: its pages up to its last fresh token, int64 [1, N], and which of their positions
    each fresh token sees, bool [n, N * block_size]; None where nothing lies before the fresh tokens.
    """

    lengths: tuple[int, ...]  # fresh tokens of each prompt
    positions: Tensor  # int64 [T], T = sum(lengths)
    slots: Tensor  # int64 [T]
    prefixes: tuple[tuple[Tensor, Tensor] | None, ...]
    cache: KVCache

    def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        kv = self.cache.write(layer, self.slots, kv)
        parts = zip(q.split(self.lengths), kv.split(self.lengths), self.prefixes, strict=True)
        return torch.cat([self._attend(layer, *part) for part in parts])

    def _attend(self, layer: int, q: Tensor, kv: Tensor, prefix: tuple[Tensor, Tensor] | None) -> Tensor:
        if prefix is None:
            return causal_attention(q, *kv.unbind(1))
        block_table, visible = prefix
        k, v = self.cache.gather(layer, block_table).to(q.dtype).squeeze(0).unbind(1)  # [L, kv_heads, D] each
        return masked_attention(q, k, v, visible)


@dataclass(frozen=True)
class PagedDecode:
    """One new token for each of B sequences, attending to the pages of its own sequence.

    On a CPU in place, with native code; gathering the pages for torch's operator takes several times as long.
    """

    positions: Tensor  # int64 [B]
    slots: Tensor  # int64 [B]
    block_table: Tensor  # int64 [B, N], padded with any valid block
    visible: Tensor  # bool [B, 1, 1, N * block_size]: key position <= query position
    cache: KVCache

    def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        self.cache.write(layer, self.slots, kv)
        attended = decode_attention(q, self.cache.storage[layer], self.block_table, self.positions)
        if attended is not None:
            return attended
        k, v = self.cache.gather(layer, self.block_table).to(q.dtype).unbind(2)  # [B, L, kv_heads, D] each
        return grouped_attention(q, k, v, self.visible)


def paged_decode(positions: Tensor, block_table: Tensor, cache: KVCache) -> PagedDecode:
    """The decode of tokens at `positions` [B] whose sequences lie in `block_table` [B, N], in plain torch."""
    size = cache.block_size
    block = block_table.gather(1, (positions // size).unsqueeze(1)).squeeze(1)
    keys = torch.arange(block_table.shape[1] * size, device=block_table.device)
    visible = keys <= positions.unsqueeze(1)  # [B, L]
    return PagedDecode(positions, block * size + positions % size, block_table, visible[:, None, None], cache)


def packed_prefill(lengths: tuple[int, ...], device: torch.device) -> PackedPrefill:
    """A prefill that stores nothing, for training and full recomputation."""
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    return PackedPrefill(lengths, positions, positions, None)


def can_pack_sequences(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's flash attention takes sequences of all lengths in one call: on CUDA, in half precision."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> Tensor:
    """Sequences of up to `longest` tokens one after the other, `starts` int32 [n + 1], each causal: [T, heads, D].

    The operator behind torch.nn.attention.varlen, which wants one number of heads for queries and keys.
    """
    attended: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, starts, starts, longest, longest, 0.0, True, False
    )[0]
    return attended


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [T, heads, D], k and v [T, kv_heads, D] of one sequence → [T, heads, D], query t attending to keys 0..t."""
    q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (q, k, v))  # [1, heads, T, D]
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return attended.squeeze(0).transpose(0, 1)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """q [T, heads, D], k and v [L, kv_heads, D] of one sequence, visible bool [T, L] → [T, heads, D]."""
    length, num_heads, head_dim = q.shape
    group = num_heads // k.shape[1]
    q = q.view(length, k.shape[1], group, head_dim).permute(1, 2, 0, 3)  # [kv_heads, group, T, D]
    k, v = (tensor.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1) for tensor in (k, v))
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    return attended.permute(2, 0, 1, 3).reshape(length, num_heads, head_dim)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """One query per sequence: q [B, heads, D], k and v [B, L, kv_heads, D], visible [B, 1, 1, L] → [B, heads, D].

    The query heads that share a key head take the place of the query positions, so that each key is read once for the
    whole group instead of being repeated.
    """
    batch, num_heads, head_dim = q.shape
    grouped = q.view(batch, k.shape[2], num_heads // k.shape[2], head_dim)  # [B, kv_heads, group, D]
    attended = F.scaled_dot_product_attention(grouped, k.transpose(1, 2), v.transpose(1, 2), attn_mask=visible)
    return attended.reshape(batch, num_heads, head_dim)


def _movable(values: Tensor) -> Tensor:
    """A view of 8-bit floats as the bytes that they are: torch scatters those alone."""
    return values.view(torch.uint8) if values.dtype == E4M3 else values


def _lazy_zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Zeros whose pages the CPU touches on first use only: a cache costs the memory that is used, not the most it may.

    They must be zeros: masked positions are multiplied by 0, and 0 * NaN would be NaN.
    """
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    raw = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)  # calloc
    return torch.from_numpy(raw).view(dtype).view(shape)
