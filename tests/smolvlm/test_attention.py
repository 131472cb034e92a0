from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from smolvlm.attention import KVCache, PackedPrefill, PagedDecode, PagedPrefill, causal_attention, packed_prefill
from smolvlm.config import TextConfig
from smolvlm.precision import E4M3

CPU = torch.device("cpu")
CACHE_DTYPES = [torch.float32, E4M3]
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8
CONFIG = TextConfig(
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    vocab_size=50,
    rope_theta=1e4,
    max_positions=128,
    rms_norm_eps=1e-5,
)


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention head by head, the definition."""
    length, group = q.shape[0], HEADS // KV_HEADS
    outputs = []
    for head in range(HEADS):
        scores = q[:, head] @ k[:, head // group].T / HEAD_DIM**0.5
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        outputs.append(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v[:, head // group])
    return torch.stack(outputs, dim=1)


def test_causal_attention_is_the_definition() -> None:
    q, k, v = _random(9, HEADS, HEAD_DIM, seed=0), *_random(2, 9, KV_HEADS, HEAD_DIM, seed=1)
    torch.testing.assert_close(causal_attention(q, k, v), _written_out(q, k, v))


def test_packed_prompts_do_not_see_each_other() -> None:
    lengths = (3, 1, 7)
    q, kv = _random(11, HEADS, HEAD_DIM, seed=0), _random(11, 2, KV_HEADS, HEAD_DIM, seed=1)
    attention = packed_prefill(lengths, CPU)
    assert attention.positions.tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4, 5, 6]
    parts = zip(q.split(lengths), kv.split(lengths), strict=True)
    expected = torch.cat([_written_out(part, *pair.unbind(1)) for part, pair in parts])
    torch.testing.assert_close(attention.attend(0, q, kv), expected)


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("layer", [0, 1])
def test_paged_decode_equals_attention_over_the_whole_sequence(layer: int, dtype: torch.dtype) -> None:
    """Sequences of uneven length, on scattered blocks, in a cache whose other slots hold rubbish."""
    cache = _cache_of_rubbish(dtype)
    tables, lengths = [[7, 2, 5], [3], [0, 8]], [9, 2, 8]
    history = [_random(length, 2, KV_HEADS, HEAD_DIM, seed=length) for length in lengths]
    queries = [_random(length, HEADS, HEAD_DIM, seed=10 + length) for length in lengths]
    _prefill(cache, layer, [kv[:-1] for kv in history], tables)
    attention = _decode(cache, tables, lengths)
    last = [torch.stack([each[-1] for each in rows]) for rows in (queries, history)]
    stored = [kv.to(dtype).float() for kv in history]
    expected = [_written_out(q, *kv.unbind(1))[-1] for q, kv in zip(queries, stored, strict=True)]
    torch.testing.assert_close(attention.attend(layer, *last), torch.stack(expected))


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("starts", [(4, 8, 0), (5, 0, 3), (1, 13, 2)])
def test_a_prefill_behind_cached_pages_equals_attention_over_the_whole_prompt(
    starts: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Prompts cut anywhere, one of them perhaps from its beginning, in a cache whose other slots hold rubbish."""
    cache = _cache_of_rubbish(dtype)
    tables, lengths = [[7, 2, 5], [3, 1, 6, 0], [8]], [9, 14, 4]
    kv = [_random(length, 2, KV_HEADS, HEAD_DIM, seed=length) for length in lengths]
    queries = [_random(length, HEADS, HEAD_DIM, seed=10 + length) for length in lengths]
    before = [(each[:start], table) for each, table, start in zip(kv, tables, starts, strict=True) if start]
    _prefill(cache, 1, *(list(column) for column in zip(*before, strict=True)))
    attention = _behind(cache, tables, starts, lengths)
    fresh = [torch.cat([each[start:] for each, start in zip(rows, starts, strict=True)]) for rows in (queries, kv)]
    parts = zip(queries, kv, starts, strict=True)
    expected = [_written_out(q, *each.to(dtype).float().unbind(1))[start:] for q, each, start in parts]
    torch.testing.assert_close(attention.attend(1, *fresh), torch.cat(expected))


def test_keys_beyond_the_range_of_8_bit_floats_become_the_largest() -> None:
    cache = KVCache(CONFIG, num_blocks=1, block_size=4, device=CPU, dtype=E4M3)
    kv = torch.full((2, 2, KV_HEADS, HEAD_DIM), 1e4) * torch.tensor([1, -1]).view(2, 1, 1, 1)
    stored = cache.write(0, torch.tensor([3, 1]), kv)
    assert torch.equal(stored, kv.clamp(-448, 448))
    assert torch.equal(cache.gather(0, torch.tensor([[0]]))[0, [3, 1]].float(), stored)


def _cache_of_rubbish(dtype: torch.dtype) -> KVCache:
    cache = KVCache(CONFIG, num_blocks=9, block_size=4, device=CPU, dtype=dtype)
    cache.storage.copy_(torch.randn(cache.storage.shape) * 100)
    return cache


def _behind(cache: KVCache, tables: list[list[int]], starts: tuple[int, ...], lengths: list[int]) -> PagedPrefill:
    parts = list(zip(tables, starts, lengths, strict=True))
    positions = torch.cat([torch.arange(start, length) for _, start, length in parts])
    slots = torch.tensor([slot for table, start, length in parts for slot in _slots(table, range(start, length))])
    visible = [torch.arange(len(table) * 4) <= torch.arange(start, stop).unsqueeze(1) for table, start, stop in parts]
    prefixes = [(torch.tensor([table]), each) for table, each in zip(tables, visible, strict=True)]
    kept = tuple(prefix if start else None for prefix, start in zip(prefixes, starts, strict=True))
    return PagedPrefill(tuple(length - start for _, start, length in parts), positions, slots, kept, cache)


def _slots(table: list[int], positions: Iterable[int]) -> list[int]:
    return [table[position // 4] * 4 + position % 4 for position in positions]


def _prefill(cache: KVCache, layer: int, history: list[Tensor], tables: list[list[int]]) -> None:
    for kv, table in zip(history, tables, strict=True):
        positions = torch.arange(len(kv))
        attention = PackedPrefill((len(kv),), positions, torch.tensor(_slots(table, range(len(kv)))), cache)
        attention.attend(layer, torch.zeros(len(kv), HEADS, HEAD_DIM), kv)


def _decode(cache: KVCache, tables: list[list[int]], lengths: list[int]) -> PagedDecode:
    positions = torch.tensor([length - 1 for length in lengths])
    slots = [_slots(table, [length - 1])[0] for table, length in zip(tables, lengths, strict=True)]
    padded = torch.tensor([table + [0] * (3 - len(table)) for table in tables])
    visible = torch.arange(12) <= positions.unsqueeze(1)
    return PagedDecode(positions, torch.tensor(slots), padded, visible[:, None, None], cache)


@pytest.mark.parametrize("dtype", [torch.bfloat16, E4M3])
def test_a_new_cache_holds_zeros_and_costs_what_block_bytes_says_and_a_block_more(dtype: torch.dtype) -> None:
    cache = KVCache(CONFIG, num_blocks=5, block_size=4, device=CPU, dtype=dtype)
    assert cache.storage.dtype is dtype
    assert not cache.storage.float().any()
    assert cache.scratch == 5
    assert cache.storage.nbytes == 6 * KVCache.block_bytes(CONFIG, 4, dtype)
    assert KVCache.block_bytes(CONFIG, 4, E4M3) * 4 == KVCache.block_bytes(CONFIG, 4, torch.float32)
