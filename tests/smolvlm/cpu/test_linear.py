"""Native 8-bit products against their definition in float64, on random shapes; skipped where they cannot be built."""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from smolvlm.cpu import linear as linear_module
from smolvlm.cpu.build import SOURCES, compiler
from smolvlm.cpu.linear import Int8Linear, NativeNorm, has_int8, interleaved, product, quantized, tail
from smolvlm.text import rotate

needs_int8 = pytest.mark.skipif(not has_int8(), reason="no C++ compiler, or no AVX2")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
SIZES = st.sampled_from([16, 48, 64, 80, 128, 208])


def rounded(x: Tensor) -> Tensor:
    """Rows as the products see them: 256 steps from the smallest value to the largest, in float64."""
    x = x.double()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = ((high - low) / 255).clamp_min(1e-300)
    return low + ((x - low) / step).round() * step


def definition(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    integers, scale, _ = quantized(weight)
    product = rounded(x) @ (integers.double() * scale.double().unsqueeze(1)).T
    return product if bias is None else product + bias.double()


def close(actual: Tensor, expected: Tensor) -> None:
    """A value half-way between two steps may take either; bfloat16 results are rounded once more."""
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < (2e-3 if actual.dtype == torch.float32 else 1e-2)


@needs_int8
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 230), inputs=SIZES, outputs=SIZES, bias=st.booleans(), dtype=DTYPES, threads=st.integers(1, 3)
)
def test_a_product_is_the_definition_and_does_not_depend_on_the_batch(
    rows: int, inputs: int, outputs: int, bias: bool, dtype: torch.dtype, threads: int
) -> None:
    torch.set_num_threads(threads)
    random = torch.Generator().manual_seed(rows * inputs + outputs)
    x = (torch.randn(rows, inputs, generator=random) * 3 + 1).to(dtype)
    weight = torch.randn(outputs, inputs, generator=random).to(dtype)
    added = torch.randn(outputs, generator=random).to(dtype) if bias else None
    packed = Int8Linear(weight, added)
    out = product(x, packed)
    assert (out.dtype, out.shape) == (dtype, (rows, outputs))
    close(out, definition(x, weight, added))
    row = rows // 2
    torch.testing.assert_close(product(x[row : row + 1], packed)[0], out[row], atol=0, rtol=0)


@needs_int8
@pytest.mark.parametrize("norm", [nn.LayerNorm(80), nn.RMSNorm(80, eps=1e-5)])
def test_a_norm_runs_inside(norm: nn.LayerNorm | nn.RMSNorm) -> None:
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    x, weight = torch.randn(3, 7, 80) * 5 - 2, torch.randn(64, 80)
    with torch.inference_mode():
        close(product(x, Int8Linear(weight, None), NativeNorm(norm)), definition(norm(x), weight, None))


@needs_int8
def test_heads_are_turned_and_those_behind_them_are_not() -> None:
    x, weight = torch.randn(9, 48), torch.randn(4 * 64, 48)
    angles = torch.rand(9, 1, 32) * 6
    cos, sin = angles.cos().repeat(1, 1, 2), torch.cat([-angles.sin(), angles.sin()], -1)
    heads = definition(x, weight, None).unflatten(1, (4, 64))
    expected = torch.cat([rotate(heads[:, :3], cos.double(), sin.double()), heads[:, 3:]], 1).flatten(1)
    close(product(x, Int8Linear(weight, None), rotary=(cos, sin, 3)), expected)


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 6, 16, 100])
@pytest.mark.parametrize("gated", [False, True])
def test_what_follows_attention(rows: int, gated: bool, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(rows)
    norm = (nn.RMSNorm if gated else nn.LayerNorm)(80, eps=1e-5)  # of weights 1
    attended, hidden = (torch.randn(rows, size, generator=random).to(dtype) for size in (48, 80))
    shapes = ((80, 48), (2 * 96 if gated else 96, 80), (80, 96))
    output, up, down = ((torch.randn(shape, generator=random) * 0.2).to(dtype) for shape in shapes)
    with torch.inference_mode():
        first = (hidden.double() + definition(attended, output, None)).to(dtype)
        between = definition(norm(first.float()), up, None)
        opened = F.silu(between[:, :96]) * between[:, 96:] if gated else F.gelu(between, approximate="tanh")
        expected = first.double() + definition(opened.to(dtype), down, None)
        norm.to(dtype)
        mlp = Int8Linear(interleaved(up) if gated else up, None), Int8Linear(down, None)
        close(tail(attended, hidden, Int8Linear(output, None), NativeNorm(norm), mlp), expected)


@needs_int8
def test_rows_without_any_difference_are_exact() -> None:
    weight = torch.randint(-127, 128, (64, 16)).float()
    weight[:, 0] = 127  # so that 1 counts 1
    for value in (0.0, 2.0, -3.0):
        assert torch.equal(product(torch.full((5, 16), value), Int8Linear(weight, None))[0], value * weight.sum(1))


@needs_int8
def test_weights_of_nothing_but_zeros() -> None:
    assert torch.equal(product(torch.randn(4, 32), Int8Linear(torch.zeros(48, 32), None)), torch.zeros(4, 48))


EMULATED = """
#include <immintrin.h>
#include <cstdint>
#include <cstring>
#include <vector>
using Words = int32_t __attribute__((vector_size(64)));
static inline Words emulated_load(const void* from) { Words all; std::memcpy(&all, from, 64); return all; }
static inline Words emulated_products(Words sums, Words bytes, Words signed_bytes) {
  uint8_t a[64]; int8_t b[64];
  std::memcpy(a, &bytes, 64), std::memcpy(b, &signed_bytes, 64);
  for (int i = 0; i < 64; i++) sums[i / 4] += a[i] * b[i];
  return sums;
}
#define __AVX512VNNI__ 1
#define __m512i Words
#define _mm512_loadu_si512 emulated_load
#define _mm512_set1_epi32(word) (Words{} + (word))
#define _mm512_dpbusd_epi32 emulated_products
#define __asm__(...)
"""


@needs_int8
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 16, 64), (17, 80, 208), (100, 48, 128)])
def test_processors_with_avx512_compute_the_same(
    rows: int, inputs: int, outputs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    found = []
    for name, text in {"narrow": "", "wide": EMULATED}.items():
        library = _built(tmp_path / name, text)
        linear_module._function.cache_clear()
        monkeypatch.setattr(linear_module, "native_library", lambda _, library=library: library)
        found.append((library.columns_of_tile(), product(x, Int8Linear(weight, None))))
    linear_module._function.cache_clear()
    (narrow, first), (wide, second) = found
    assert (narrow, wide) == (16, 64)
    assert torch.equal(first, second)


def _built(place: Path, included: str) -> ctypes.CDLL:
    header, target = place.with_suffix(".h"), place.with_suffix(".so")
    header.write_text(included, encoding="utf-8")
    flags = ["-O1", "-march=x86-64-v3", "-std=c++17", "-fPIC", "-Wno-psabi", "-fopenmp", "-shared"]
    command = [compiler(), *flags, "-include", str(header), "-o", str(target), str(SOURCES / "layers.cpp")]
    subprocess.run(command, check=True, timeout=100)
    return ctypes.CDLL(str(target))


@needs_int8
@pytest.mark.parametrize("processor", ["x86-64", "icelake-server", "sapphirerapids"])
def test_it_compiles_for_other_processors(processor: str) -> None:
    command = [compiler(), "-fsyntax-only", f"-march={processor}", "-std=c++17", "-Wno-psabi", "-fopenmp", "-Wall"]
    subprocess.run([*command, "-Werror", str(SOURCES / "layers.cpp")], check=True, timeout=100)
