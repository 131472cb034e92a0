"""Decode attention over paged keys and values, for CUDA: no gather, no mask, every page read once.

One program serves all query heads that share a key/value head, so that a tile of keys and values is loaded once for the
whole group, and folds tiles into a running softmax in float32. The new token's own key and value come from registers
and are stored into their page on the way. Where a batch is too small to fill the device, several programs share a
sequence and a second kernel joins their parts.

Sources: online softmax, Milakov and Gimelshein, https://arxiv.org/abs/1805.02867; split keys, Flash-Decoding,
https://pytorch.org/blog/flash-decoding; pages, Kwon et al., https://arxiv.org/abs/2309.06180.

The plain torch equivalent is smolvlm.attention.paged_decode.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from smolvlm.attention import KVCache
from smolvlm.kernels.paged_decode_triton import attend_kernel, join_kernel
from smolvlm.precision import E4M3

TILE = 64  # keys per step of a program
DOT_ROWS = 16  # the fewest rows a tensor core multiplies; a group's query heads are padded to it
MAX_SPLITS = 16
PROGRAMS_PER_PROCESSOR = 2
NUM_STAGES = 5  # the fewest with which the compiled loop has the next tile under way while it works on one
HEAD_DIMS = (16, 32, 64, 128)
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class FusedPagedDecode:
    """One new token for each of B sequences, attending to the pages of its own sequence (an Attention)."""

    positions: Tensor  # integers [B]
    block_table: Tensor  # integers [B, N], anything valid behind a sequence's last page
    cache: KVCache
    splits: int  # programs that share a sequence

    def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        pages = self.cache.storage[layer]
        return attend_pages(q, kv, pages, self.block_table, self.positions, self.splits)


def fused_paged_decode(positions: Tensor, block_table: Tensor, cache: KVCache) -> FusedPagedDecode:
    """The fused decode of tokens at `positions` [B] whose sequences lie in `block_table` [B, N]."""
    processors = torch.cuda.get_device_properties(positions.device).multi_processor_count if positions.is_cuda else 1
    splits = num_splits(len(positions) * cache.token_shape[1], processors)
    return FusedPagedDecode(positions, block_table, cache, splits)


def check_supported(cache: KVCache) -> None:
    """Raise ValueError for heads of a size, or values of a type, that the kernel does not take."""
    head_dim, dtype = cache.token_shape[2], cache.storage.dtype
    if head_dim not in HEAD_DIMS or dtype not in (*DTYPES, E4M3):
        raise ValueError(
            f"the fused decode takes heads of {', '.join(map(str, HEAD_DIMS))} values in float32, bfloat16, float16 or "
            f"e4m3; the cache has {head_dim} in {dtype}: use decode='eager'"
        )


def num_splits(num_programs: int, num_processors: int) -> int:
    """How many programs share a sequence, a power of two, so that every processor has two where that is possible."""
    wanted = -(-PROGRAMS_PER_PROCESSOR * num_processors // num_programs)
    return min(MAX_SPLITS, 1 << (wanted - 1).bit_length())


def attend_pages(q: Tensor, kv: Tensor, pages: Tensor, block_table: Tensor, positions: Tensor, splits: int) -> Tensor:
    """Store the new keys and values, and attend to them and all before them.

    Args:
        q: [B, heads, D], the last dimension dense.
        kv: [B, 2, kv_heads, D], the last dimension dense.
        pages: one layer of the cache, dense [blocks, block_size, 2, kv_heads, D], in the dtype of q or e4m3; written at
            each sequence's position.
        block_table: [B, N], the blocks of each sequence.
        positions: [B], where the new tokens stand; the cache holds all before.
        splits: programs that share a sequence, a power of two.

    Returns:
        [B, heads, D] in the dtype of q.
    """
    assert pages.is_contiguous(), "a layer of the cache is dense"
    assert q.stride(2) == kv.stride(3) == block_table.stride(1) == 1, "last dimensions are dense"
    batch, num_heads, head_dim = q.shape
    num_kv_heads = pages.shape[3]
    out = torch.empty((batch, num_heads, head_dim), device=q.device, dtype=q.dtype)
    parts = weights = out
    if splits > 1:
        parts = torch.empty((batch, num_heads, splits, head_dim), device=q.device, dtype=torch.float32)
        weights = torch.empty((batch, num_heads, splits), device=q.device, dtype=torch.float32)
    attend_kernel[(batch, num_kv_heads, splits)](
        q, kv, pages, block_table, positions, parts, weights,
        q.stride(0), q.stride(1), kv.stride(0), kv.stride(1), kv.stride(2), block_table.stride(0), positions.stride(0),
        math.log2(math.e) / math.sqrt(head_dim),
        KV_HEADS=num_kv_heads, GROUP=num_heads // num_kv_heads, ROWS=_padded(num_heads // num_kv_heads),
        HEAD_DIM=head_dim, PAGE=pages.shape[1], TILE=TILE, SPLITS=splits, PRODUCT=_product_type(q.dtype),
        num_stages=NUM_STAGES,
    )  # fmt: skip
    if splits > 1:
        join_kernel[(batch * num_heads,)](parts, weights, out, HEAD_DIM=head_dim, SPLITS=splits)
    return out


def _padded(group: int) -> int:
    return max(DOT_ROWS, 1 << (group - 1).bit_length())


def _product_type(dtype: torch.dtype) -> tl.dtype:
    """What products are computed in, always summed in float32; the interpreter knows no bfloat16 products."""
    return tl.float32 if triton.knobs.runtime.interpret else DTYPES[dtype]
