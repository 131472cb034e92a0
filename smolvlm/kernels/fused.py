"""What stands between the matrix products, for CUDA: each kernel reads and writes its tensors once.

torch's own operators make several passes where one is enough (a residual sum and a norm; a rotation by halves; a
softmax over the vocabulary only to find its largest value), and launch several kernels where a decode step's time is
that of its launches. Sums and functions are computed in float32 whatever the dtype of the tensors.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor, nn

from smolvlm.kernels.fused_triton import (
    gate_kernel,
    likeliest_kernel,
    norm_kernel,
    patches_kernel,
    quantize_kernel,
    rotate_kernel,
)
from smolvlm.precision import E4M3
from smolvlm.vision import PatchEmbedding

GATE_BLOCK = 1024
VOCABULARY_BLOCK = 4096


def add_and_norm(hidden: Tensor, delta: Tensor | None, norm: nn.LayerNorm | nn.RMSNorm) -> Tensor:
    """`hidden` [.., H] grows by delta, in place; the result is its norm."""
    assert hidden.is_contiguous(), "rows are dense"
    assert delta is None or delta.is_contiguous(), "rows are dense"
    size, out = hidden.shape[-1], torch.empty_like(hidden)
    centres = isinstance(norm, nn.LayerNorm)
    block = triton.next_power_of_2(size)
    norm_kernel[(hidden.numel() // size,)](
        hidden, hidden if delta is None else delta, norm.weight, norm.bias if centres else norm.weight, out, norm.eps,
        SIZE=size, BLOCK=block, ADDS=delta is not None, CENTRES=centres, num_warps=max(1, min(8, block // 256)),
    )  # fmt: skip
    return out


def rotate_in_place(heads: Tensor, num: int, positions: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn the first `num` of heads [T, n, D] by the positions [T] of their tokens (smolvlm.text.rotate)."""
    assert heads.stride(1) == heads.shape[2], "the heads of a token are dense"
    assert heads.stride(2) == positions.stride(0) == 1, "the heads of a token are dense"
    rotate_kernel[(len(heads),)](
        heads, positions, cos, sin, heads.stride(0),
        HEADS=num, ROWS=triton.next_power_of_2(num), HEAD_DIM=heads.shape[2],
    )  # fmt: skip


def silu_and_multiply(gate_up: Tensor) -> Tensor:
    """[T, 2 * I], gate beside up → silu(gate) * up, [T, I]."""
    assert gate_up.is_contiguous(), "rows are dense"
    rows, size = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    gate_kernel[(rows, triton.cdiv(size, GATE_BLOCK))](gate_up, out, SIZE=size, BLOCK=GATE_BLOCK)
    return out


def choose_likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, V] → the likeliest tokens int64 [B], of equals the first, and their log-probabilities float32 [B]."""
    assert logits.is_contiguous(), "rows are dense"
    rows, size = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(VOCABULARY_BLOCK, triton.next_power_of_2(size))
    likeliest_kernel[(rows,)](logits, tokens, logprobs, SIZE=size, BLOCK=block, num_warps=8)
    return tokens, logprobs


def cut_and_normalise(pixels: Tensor, embedding: PatchEmbedding) -> Tensor:
    """uint8 tiles [N, S, S, C] → normalised patches [N, grid², C * p * p] in the dtype of the embedding's weights."""
    assert pixels.is_contiguous(), "tiles are dense"
    num_tiles, side, _, channels = pixels.shape
    weight, num_patches = embedding.projection.weight, embedding.grid**2
    out = torch.empty(num_tiles, num_patches, weight.shape[1], dtype=weight.dtype, device=pixels.device)
    patches_kernel[(num_tiles * num_patches,)](
        pixels, embedding.mean, embedding.std, out, SIDE=side, CHANNELS=channels, PATCH=embedding.patch_size,
        GRID=embedding.grid, BLOCK=triton.next_power_of_2(weight.shape[1]),
    )  # fmt: skip
    return out


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """[.., n] → e4m3 [.., n] and the scale of each row, float32 [.., 1] (smolvlm.fp8.quantized_rows)."""
    assert values.is_contiguous(), "rows are dense"
    size = values.shape[-1]
    out = torch.empty_like(values, dtype=E4M3)
    scales = torch.empty((*values.shape[:-1], 1), dtype=torch.float32, device=values.device)
    block = triton.next_power_of_2(size)
    quantize_kernel[(values.numel() // size,)](
        values, out, scales, SIZE=size, BLOCK=block, num_warps=max(1, min(8, block // 256))
    )
    return out, scales
