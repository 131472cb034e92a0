"""The fused decode against plain torch: same pages in, same answers and same pages out.

Runs in Triton's interpreter on a CPU (tests/conftest.py); with TRITON_INTERPRET=0 and a GPU, compiled.
"""

import os
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smolvlm.attention import KVCache, paged_decode
from smolvlm.config import TextConfig
from smolvlm.kernels.paged_decode import (
    MAX_SPLITS,
    TILE,
    FusedPagedDecode,
    attend_pages,
    check_supported,
    num_splits,
)
from smolvlm.precision import E4M3, has_fp8, to_e4m3

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
HAS_FP8 = INTERPRETED or (torch.cuda.is_available() and has_fp8(DEVICE))
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}
LAYER = 1
needs_fp8 = pytest.mark.skipif(not HAS_FP8, reason="needs a GPU of compute capability 8.9")


@dataclass(frozen=True)
class Case:
    """Sequences of `lengths` tokens, the new one included, on scattered pages."""

    lengths: tuple[int, ...]
    kv_heads: int = 3
    group: int = 3
    head_dim: int = 64
    page: int = 16
    splits: int = 1
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None  # None is dtype
    spare_pages: int = 2  # columns of the block table behind the longest sequence
    seed: int = 0


def _config(case: Case) -> TextConfig:
    heads = case.kv_heads * case.group
    return TextConfig(8, 8, 2, heads, case.kv_heads, case.head_dim, 8, 1e4, 4096, 1e-5)


def _inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor, KVCache]:
    """Queries, new keys and values, block table, positions, and pages that are NaN wherever no token is."""
    generator = torch.Generator().manual_seed(case.seed)
    counts = [-(-length // case.page) for length in case.lengths]
    num_blocks = sum(counts) + 3
    cache = KVCache(_config(case), num_blocks, case.page, DEVICE, case.cache_dtype or case.dtype)
    order = torch.randperm(num_blocks, generator=generator)
    table = torch.full((len(counts), max(counts) + case.spare_pages), cache.scratch)
    for row, (count, blocks) in enumerate(zip(counts, order.split([*counts, 3])[:-1], strict=True)):
        table[row, :count] = blocks
    history = torch.randn(cache.storage.shape, generator=generator)
    stored = torch.zeros(cache.storage.shape[1:3], dtype=torch.bool)
    for row, length in enumerate(case.lengths):
        keys = torch.arange(length - 1)
        stored[table[row, keys // case.page], keys % case.page] = True
    cache.storage.copy_(torch.where(stored[None, :, :, None, None, None], history, torch.nan))
    q, kv = (
        torch.randn(len(counts), *shape, generator=generator).to(DEVICE, case.dtype)
        for shape in ((case.kv_heads * case.group, case.head_dim), cache.token_shape)
    )
    positions = torch.tensor(case.lengths) - 1
    return q, kv, table.to(DEVICE), positions.to(DEVICE), cache


def _expected(q: Tensor, kv: Tensor, table: Tensor, positions: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
    """Attended values and pages afterwards, by plain torch in float32, which wants no NaN in what it masks."""
    kind = E4M3 if cache.storage.dtype == E4M3 else torch.float32
    plain = KVCache.__new__(KVCache)
    plain.__dict__ |= cache.__dict__ | {"storage": cache.storage.float().nan_to_num().to(kind)}
    plain._gathered = torch.empty(0, device=DEVICE, dtype=kind)
    attended = paged_decode(positions, table, plain).attend(LAYER, q.float(), kv.float())
    return attended.to(q.dtype), plain.storage.float()


def _check(case: Case) -> None:
    q, kv, table, positions, cache = _inputs(case)
    attended, pages = _expected(q, kv, table, positions, cache)
    untouched = cache.storage[1 - LAYER].clone()
    ours = FusedPagedDecode(positions, table, cache, case.splits).attend(LAYER, q, kv)
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(ours, attended, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(cache.storage[LAYER].float().nan_to_num(), pages[LAYER], rtol=0, atol=0)
    others = (each.float() for each in (cache.storage[1 - LAYER], untouched))
    torch.testing.assert_close(*others, rtol=0, atol=0, equal_nan=True)


EDGES = (1, 2, 15, 16, 17, 32, 33, TILE, TILE + 1, TILE + 2, 3 * TILE + 5)


@pytest.mark.parametrize(("kv_heads", "group"), [(3, 3), (5, 3), (32, 1), (2, 2)])
@pytest.mark.parametrize("splits", [1, 2])
def test_lengths_at_every_edge(kv_heads: int, group: int, splits: int) -> None:
    lengths = EDGES if kv_heads < 32 else EDGES[::4]
    _check(Case(lengths, kv_heads, group, splits=splits))


def test_more_programs_than_tiles() -> None:
    _check(Case((1, 2, TILE + 1, 3 * TILE), splits=MAX_SPLITS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    _check(Case((1, 70, 33), dtype=dtype))
    _check(Case((1, 70, 33), dtype=dtype, splits=2))


@needs_fp8
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("splits", [1, 2])
def test_pages_of_8_bit_floats(dtype: torch.dtype, splits: int) -> None:
    _check(Case((1, 70, 33, TILE + 2), dtype=dtype, cache_dtype=E4M3, splits=splits))


@needs_fp8
def test_new_tokens_are_rounded_to_8_bits_as_torch_does() -> None:
    """All sizes from below the smallest to beyond the largest, halves between two neighbours among them."""
    case = Case((1, 20), kv_heads=4, group=1, cache_dtype=E4M3)
    q, kv, table, positions, cache = _inputs(case)
    finite = torch.arange(256, dtype=torch.uint8).view(E4M3).float().nan_to_num()
    halves = (finite[:-1] + finite[1:]) / 2
    odd = torch.cat([finite, halves, torch.tensor([2.0**-10, 449.0, 500.0, 1e30, torch.inf]), finite * 1.03])
    for start in range(0, len(odd), kv[0].numel()):
        values = odd[start : start + kv[0].numel()].to(DEVICE)
        kv[0].view(-1)[: len(values)] = values
        kv[1].view(-1)[: len(values)] = -values
        attend_pages(q, kv, cache.storage[LAYER], table, positions, 1)
        stored = cache.storage[LAYER, table[:, positions // 16].diag(), positions % 16]
        torch.testing.assert_close(stored.float(), to_e4m3(kv).float(), rtol=0, atol=0)


@settings(max_examples=12 if INTERPRETED else 200, deadline=None)
@given(
    st.builds(
        Case,
        lengths=st.lists(st.integers(1, 200), min_size=1, max_size=3).map(tuple),
        kv_heads=st.integers(1, 3),
        group=st.integers(1, 4),
        head_dim=st.sampled_from([16, 64]),
        page=st.sampled_from([4, 16]),
        splits=st.sampled_from([1, 2, 8]),
        dtype=st.sampled_from(list(TOLERANCE)),
        cache_dtype=st.sampled_from([None, E4M3] if HAS_FP8 else [None]),
        spare_pages=st.integers(0, 3),
        seed=st.integers(0, 99),
    )
)
def test_random_shapes(case: Case) -> None:
    _check(case)


def test_sequences_may_share_the_pages_of_a_common_beginning() -> None:
    """Two sequences, two full pages in common, each with a page of its own behind them."""
    q, kv, table, positions, cache = _inputs(Case((40, 37)))
    table[1, :2] = table[0, :2]
    attended, _ = _expected(q, kv, table, positions, cache)
    torch.testing.assert_close(FusedPagedDecode(positions, table, cache, 1).attend(LAYER, q, kv), attended)


def test_padding_rows_touch_the_scratch_block_alone() -> None:
    """Rows at position 0 of the scratch block, several of them, beside a real one."""
    q, kv, table, positions, cache = _inputs(Case((40, 1, 1)))
    table[1:] = cache.scratch
    before = cache.storage.clone()
    ours = FusedPagedDecode(positions, table, cache, 2).attend(LAYER, q, kv)
    torch.testing.assert_close(ours[1:].unflatten(1, (3, 3)), kv[1:, 1].unsqueeze(2).expand(-1, -1, 3, -1))
    cache.storage[LAYER, cache.scratch] = before[LAYER, cache.scratch]
    cache.storage[LAYER, table[0, 39 // 16], 39 % 16] = torch.nan
    torch.testing.assert_close(cache.storage, before, equal_nan=True, rtol=0, atol=0)


def test_views_with_strides_of_their_own() -> None:
    """As the decoder hands them over: queries a slice of a joint projection, positions a column of a table."""
    q, kv, table, positions, cache = _inputs(Case((5, 50)))
    attended, _ = _expected(q, kv, table, positions, cache)
    joint = torch.cat([q, torch.zeros_like(q)], dim=1)[:, : q.shape[1]]
    rows = torch.cat([positions.unsqueeze(1), table], dim=1)
    assert not joint.is_contiguous()
    assert not rows[:, 0].is_contiguous()
    ours = FusedPagedDecode(rows[:, 0], rows[:, 1:], cache, 2).attend(LAYER, joint, kv)
    torch.testing.assert_close(ours, attended)


@pytest.mark.parametrize(("programs", "splits"), [(3, 16), (24, 16), (96, 4), (132, 2), (264, 1), (768, 1)])
def test_small_batches_are_split_until_the_device_is_full(programs: int, splits: int) -> None:
    assert num_splits(programs, num_processors=132) == splits


def test_heads_it_cannot_take_are_refused() -> None:
    config = replace(_config(Case((1,))), head_dim=72)
    with pytest.raises(ValueError, match=r"heads of 16, 32, 64, 128 values .* has 72 in torch\.float32: use decode="):
        check_supported(KVCache(config, 2, 16, DEVICE, torch.float32))
    for dtype in (torch.bfloat16, E4M3):
        check_supported(KVCache(replace(config, head_dim=64), 2, 16, DEVICE, dtype))
