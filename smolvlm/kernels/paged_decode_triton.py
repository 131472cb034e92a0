"""The device code of smolvlm.kernels.paged_decode, which explains it."""

import triton
import triton.language as tl

from smolvlm.kernels.e4m3_triton import to_e4m3


@triton.jit
def attend_kernel(
    q_ptr, kv_ptr, pages_ptr, table_ptr, positions_ptr, out_ptr, weights_ptr,
    q_batch, q_head, kv_batch, kv_part, kv_head, table_batch, positions_batch,
    scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr,
    TILE: tl.constexpr, SPLITS: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """A share of one sequence's keys, for one key/value head and all query heads that use it. `scale` is that of
    attention times log2(e): the softmax runs on powers of two."""
    sequence, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, dims = tl.arange(0, ROWS), tl.arange(0, HEAD_DIM)
    token_size: tl.constexpr = 2 * KV_HEADS * HEAD_DIM
    position = tl.load(positions_ptr + sequence * positions_batch).to(tl.int32)
    table_row = table_ptr + sequence.to(tl.int64) * table_batch
    heads = head * GROUP + rows
    q = tl.load(
        q_ptr + sequence * q_batch + heads[:, None] * q_head + dims[None, :], mask=rows[:, None] < GROUP, other=0.0
    )

    new = kv_ptr + sequence * kv_batch + head * kv_head + dims
    k_new = _as_stored(tl.load(new), pages_ptr.dtype.element_ty)
    v_new = _as_stored(tl.load(new + kv_part), pages_ptr.dtype.element_ty)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    if split == 0:
        slot = tl.load(table_row + position // PAGE).to(tl.int64) * PAGE + position % PAGE
        stored = pages_ptr + slot * token_size + head * HEAD_DIM + dims
        tl.store(stored, k_new)
        tl.store(stored + KV_HEADS * HEAD_DIM, v_new)
        best = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], axis=1) * scale
        total += 1.0
        sums += v_new.to(tl.float32)[None, :]

    share = tl.cdiv(tl.cdiv(position, TILE), SPLITS) * TILE
    start = split * share
    stop = tl.minimum(start + share, position)
    for first in range(start, stop, TILE):
        keys = first + tl.arange(0, TILE)
        inside = keys < stop
        slots = tl.load(table_row + keys // PAGE, mask=inside, other=0).to(tl.int64) * PAGE + keys % PAGE
        tile = pages_ptr + slots[:, None] * token_size + head * HEAD_DIM + dims[None, :]
        k = tl.load(tile, mask=inside[:, None], other=0.0)
        v = tl.load(tile + KV_HEADS * HEAD_DIM, mask=inside[:, None], other=0.0)
        best, total, sums = _fold(q, k, v, inside, best, total, sums, scale, PRODUCT)

    place = (sequence * KV_HEADS * GROUP + heads) * SPLITS + split
    in_group = rows < GROUP
    mean = sums / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(out_ptr + place[:, None] * HEAD_DIM + dims[None, :], mean, mask=in_group[:, None])
    if SPLITS > 1:
        weight = tl.where(total > 0.0, best + tl.log2(tl.where(total > 0.0, total, 1.0)), float("-inf"))
        tl.store(weights_ptr + place, weight, mask=in_group)


@triton.jit
def _as_stored(values, STORED: tl.constexpr):
    """Values as pages hold them."""
    if STORED.is_fp8e4nv():
        values = to_e4m3(values)
    return values.to(STORED)


@triton.jit
def _fold(q, k, v, inside, best, total, sums, scale, PRODUCT: tl.constexpr):
    """The running softmax (best score, total weight, weighted sums) of q [ROWS, D] after a tile of keys
    and values [TILE, D], of which those `inside` count."""
    scores = tl.dot(q.to(PRODUCT), tl.trans(k.to(PRODUCT)), input_precision="ieee") * scale
    scores = tl.where(inside[None, :], scores, float("-inf"))
    better = tl.maximum(best, tl.max(scores, axis=1))
    kept, chances = tl.exp2(best - better), tl.exp2(scores - better[:, None])
    total = total * kept + tl.sum(chances, axis=1)
    sums = sums * kept[:, None] + tl.dot(chances.to(PRODUCT), v.to(PRODUCT), input_precision="ieee")
    return better, total, sums


@triton.jit
def join_kernel(parts_ptr, weights_ptr, out_ptr, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr):
    """Mean of the parts [SPLITS, HEAD_DIM] of one query head, weighted by 2 to the power of their weights."""
    head = tl.program_id(0)
    splits, dims = tl.arange(0, SPLITS), tl.arange(0, HEAD_DIM)
    weights = tl.load(weights_ptr + head * SPLITS + splits)
    shares = tl.exp2(weights - tl.max(weights, axis=0))
    parts = tl.load(parts_ptr + (head * SPLITS + splits)[:, None] * HEAD_DIM + dims[None, :])
    mean = tl.sum(parts * shares[:, None], axis=0) / tl.sum(shares, axis=0)
    tl.store(out_ptr + head * HEAD_DIM + dims, mean)
