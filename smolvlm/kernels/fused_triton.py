"""The device code of smolvlm.kernels.fused, which explains it."""

import triton
import triton.language as tl

from smolvlm.kernels.e4m3_triton import LARGEST, to_e4m3

LOWEST = tl.constexpr(-3.0e38)  # finite: the difference of two infinities would be NaN
SMALLEST = tl.constexpr(1.1754943508222875e-38)  # float32's smallest normal number


@triton.jit
def norm_kernel(
    hidden_ptr, delta_ptr, weight_ptr, bias_ptr, out_ptr, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr, CENTRES: tl.constexpr,
):  # fmt: skip
    """One row: hidden += delta if it ADDS, then the norm of hidden, about its mean if it CENTRES."""
    columns = tl.arange(0, BLOCK)
    inside = columns < SIZE
    places = tl.program_id(0).to(tl.int64) * SIZE + columns
    hidden = tl.load(hidden_ptr + places, mask=inside, other=0.0)
    if ADDS:
        delta = tl.load(delta_ptr + places, mask=inside, other=0.0)
        hidden = (hidden.to(tl.float32) + delta.to(tl.float32)).to(hidden.dtype)
        tl.store(hidden_ptr + places, hidden, mask=inside)
    values = hidden.to(tl.float32)
    if CENTRES:
        values = tl.where(inside, values - tl.sum(values, axis=0) / SIZE, 0.0)
    values = values * tl.rsqrt(tl.sum(values * values, axis=0) / SIZE + eps)
    values = values * tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if CENTRES:
        values += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + places, values.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rotate_kernel(
    heads_ptr, positions_ptr, cos_ptr, sin_ptr, row_stride,
    HEADS: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One token: its first HEADS heads, turned in place. sin has the sign of smolvlm.text.rotary_table."""
    token = tl.program_id(0).to(tl.int64)
    half: tl.constexpr = HEAD_DIM // 2
    rows, dims = tl.arange(0, ROWS), tl.arange(0, half)
    angles = tl.load(positions_ptr + token).to(tl.int64) * HEAD_DIM + dims
    first = heads_ptr + token * row_stride + rows[:, None] * HEAD_DIM + dims[None, :]
    inside = rows[:, None] < HEADS
    low = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(first + half, mask=inside, other=0.0).to(tl.float32)
    turned_low = low * _row(cos_ptr, angles) + high * _row(sin_ptr, angles)
    turned_high = high * _row(cos_ptr + half, angles) + low * _row(sin_ptr + half, angles)
    tl.store(first, turned_low.to(heads_ptr.dtype.element_ty), mask=inside)
    tl.store(first + half, turned_high.to(heads_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _row(table_ptr, places):
    return tl.load(table_ptr + places).to(tl.float32)[None, :]


@triton.jit
def gate_kernel(gate_up_ptr, out_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """A piece of one row: silu(gate) * up."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < SIZE
    row = tl.program_id(0).to(tl.int64)
    gate = tl.load(gate_up_ptr + row * 2 * SIZE + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + (row * 2 + 1) * SIZE + columns, mask=inside, other=0.0).to(tl.float32)
    gated = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * SIZE + columns, gated.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def likeliest_kernel(logits_ptr, tokens_ptr, logprobs_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """One row: where its largest value stands (the first of equals), and that value's log-probability."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], LOWEST, tl.float32)
    place = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, SIZE, BLOCK):
        columns = start + lanes
        values = tl.load(logits_ptr + row * SIZE + columns, mask=columns < SIZE, other=LOWEST).to(tl.float32)
        place = tl.where(values > best, columns, place)
        better = tl.maximum(best, values)
        total = total * tl.exp(best - better) + tl.exp(values - better)
        best = better
    largest = tl.max(best, axis=0)
    chances = tl.where(best > LOWEST, total * tl.exp(best - largest), 0.0)
    token = tl.min(tl.where(best == largest, place, SIZE - 1), axis=0)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(logprobs_ptr + row, -tl.log(tl.sum(chances, axis=0)))


@triton.jit
def patches_kernel(
    pixels_ptr, mean_ptr, std_ptr, out_ptr,
    SIDE: tl.constexpr, CHANNELS: tl.constexpr, PATCH: tl.constexpr, GRID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One patch of a tile [SIDE, SIDE, CHANNELS], normalised, channel by channel."""
    size: tl.constexpr = CHANNELS * PATCH * PATCH
    patch = tl.program_id(0)
    tile, inner = patch // (GRID * GRID), patch % (GRID * GRID)
    values = tl.arange(0, BLOCK)
    inside = values < size
    channel, y, x = values // (PATCH * PATCH), values // PATCH % PATCH, values % PATCH
    row, column = inner // GRID * PATCH + y, inner % GRID * PATCH + x
    places = tile.to(tl.int64) * SIDE * SIDE * CHANNELS + (row * SIDE + column) * CHANNELS + channel
    pixels = tl.load(pixels_ptr + places, mask=inside, other=0).to(tl.float32) / 255.0
    mean = tl.load(mean_ptr + values, mask=inside, other=0.0)
    std = tl.load(std_ptr + values, mask=inside, other=1.0)
    normalised = (pixels - mean) / std
    tl.store(out_ptr + patch.to(tl.int64) * size + values, normalised.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def quantize_kernel(values_ptr, out_ptr, scales_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """One row as e4m3, its largest value at 448, and what 1 counts in it."""
    columns = tl.arange(0, BLOCK)
    inside = columns < SIZE
    row = tl.program_id(0).to(tl.int64)
    values = tl.load(values_ptr + row * SIZE + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), axis=0) / LARGEST, SMALLEST)
    tl.store(scales_ptr + row, scale)
    tl.store(out_ptr + row * SIZE + columns, to_e4m3(values / scale), mask=inside)
