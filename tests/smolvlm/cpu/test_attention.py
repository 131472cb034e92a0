"""The native functions against the definition, on random shapes; skipped where they cannot be built."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smolvlm.cpu.attention import _dense_library, decode_attention, encoder_attention
from smolvlm.cpu.build import native_library
from smolvlm.precision import E4M3

HEAD_DIM = 64
needs_native = pytest.mark.skipif(native_library("attention") is None, reason="no C++ compiler")
needs_bfloat16 = pytest.mark.skipif(_dense_library() is None, reason="no bfloat16 vector instructions, or AMX")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def _definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[heads, n, D] and [heads, L, D] → [heads, n, D], in float64."""
    q, k, v = (tensor.double() for tensor in (q, k, v))
    weights: Tensor = (q @ k.transpose(-1, -2) / HEAD_DIM**0.5).softmax(-1)
    return weights @ v


def _tolerance(dtype: torch.dtype) -> tuple[float, float]:
    """Absolute and relative."""
    return (1e-5, 1e-5) if dtype == torch.float32 else (2e-3, 1e-2)


def _pages(
    lengths: list[int], kv_heads: int, block_size: int, dtype: torch.dtype, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A cache of rubbish in which each sequence has scattered pages of its own, and their table."""
    rows = max(-(-length // block_size) for length in lengths)
    order = torch.randperm(rows * len(lengths), generator=random).view(len(lengths), rows)
    shape = (rows * len(lengths), block_size, 2, kv_heads, HEAD_DIM)
    return torch.randn(shape, generator=random).to(dtype), order


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    kv_heads=st.integers(1, 5),
    group=st.integers(1, 4),
    block_size=st.sampled_from([1, 4, 16, 24, 32]),
    dtype=DTYPES,
    in_8_bits=st.booleans(),
    threads=st.integers(1, 4),
    scale=st.sampled_from([0.1, 1.0, 8.0]),
)
def test_decode_is_the_definition_and_does_not_depend_on_the_batch(
    lengths: list[int],
    kv_heads: int,
    group: int,
    block_size: int,
    dtype: torch.dtype,
    in_8_bits: bool,
    threads: int,
    scale: float,
) -> None:
    torch.set_num_threads(threads)
    random = torch.Generator().manual_seed(sum(lengths))
    cache, table = _pages(lengths, kv_heads, block_size, E4M3 if in_8_bits else dtype, random)
    heads = torch.randn(len(lengths), (group + 1) * kv_heads, HEAD_DIM, generator=random).mul(scale).to(dtype)
    q, positions = heads[:, : group * kv_heads], torch.tensor(lengths) - 1  # strided, as it comes from the projection
    attended, (atol, rtol) = decode_attention(q, cache, table, positions), _tolerance(dtype)
    assert attended is not None
    for row, length in enumerate(lengths):
        k, v = cache[table[row]].float().flatten(0, 1)[:length].unbind(1)  # [length, kv_heads, D] each
        k, v = (each.transpose(0, 1).repeat_interleave(group, dim=0) for each in (k, v))
        expected = _definition(q[row].unsqueeze(1), k, v).squeeze(1)
        torch.testing.assert_close(attended[row].double(), expected, atol=atol, rtol=rtol)
        alone = decode_attention(q[row : row + 1], cache, table[row : row + 1], positions[row : row + 1])
        assert alone is not None
        assert torch.equal(alone[0], attended[row])


@needs_native
def test_every_8_bit_float_is_read_as_what_it_is() -> None:
    """A single key leaves its value as it is: all but the two NaN, 64 at a time."""
    values = torch.arange(256, dtype=torch.uint8).view(E4M3)
    cache = torch.stack([torch.zeros(4, HEAD_DIM).to(E4M3), values.view(4, HEAD_DIM)], dim=1).view(4, 1, 2, 1, HEAD_DIM)
    table, positions = torch.arange(4).unsqueeze(1), torch.zeros(4, dtype=torch.int64)
    attended = decode_attention(torch.ones(4, 1, HEAD_DIM), cache, table, positions)
    assert attended is not None
    numbers = ~values.float().isnan()
    assert torch.equal(attended.flatten()[numbers], values.float()[numbers])


@needs_native
def test_decode_leaves_other_shapes_to_torch() -> None:
    table, positions = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for heads, kv_heads, head_dim, dtype in [
        (5, 1, 64, torch.float32),
        (3, 1, 32, torch.float32),
        (3, 1, 64, torch.float16),
    ]:
        cache = torch.zeros(1, 16, 2, kv_heads, head_dim, dtype=dtype)
        assert decode_attention(torch.zeros(1, heads, head_dim, dtype=dtype), cache, table, positions) is None


@needs_bfloat16
@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 5),
    length=st.one_of(st.integers(1, 140), st.sampled_from([256, 729])),
    threads=st.integers(1, 4),
    scale=st.sampled_from([0.1, 1.0, 4.0]),
)
def test_encoder_attention_is_the_definition(batch: int, heads: int, length: int, threads: int, scale: float) -> None:
    torch.set_num_threads(threads)
    random = torch.Generator().manual_seed(length)
    qkv = torch.randn(batch, length, 3, heads, HEAD_DIM, generator=random).mul(scale).to(torch.bfloat16)
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    attended = encoder_attention(q, k, v)
    assert attended is not None
    torch.testing.assert_close(attended.double(), _definition(q, k, v), atol=0.02 * scale, rtol=0.02)
    separate = encoder_attention(q[:1], k[:1], v[:1])
    assert separate is not None
    assert torch.equal(separate[0], attended[0])


def test_encoder_attention_leaves_other_shapes_to_torch() -> None:
    for head_dim, dtype in [(72, torch.bfloat16), (64, torch.float32)]:
        part = torch.zeros(1, 2, 8, head_dim, dtype=dtype)
        assert encoder_attention(part, part, part) is None
