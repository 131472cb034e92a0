"""The fused kernels against the plain operators that they stand for.

Runs in Triton's interpreter on a CPU (tests/conftest.py); with TRITON_INTERPRET=0 and a GPU, compiled.
"""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smolvlm.attention import can_pack_sequences, causal_attention, packed_attention, packed_prefill
from smolvlm.config import TextConfig
from smolvlm.fp8 import quantize_encoder, quantized_rows
from smolvlm.hub import BUNDLED_DIRECTORY
from smolvlm.kernels.fused import (
    add_and_norm,
    choose_likeliest,
    cut_and_normalise,
    quantize_rows,
    rotate_in_place,
    silu_and_multiply,
)
from smolvlm.kernels.fused_model import FusedSmolVLM, linear_gelu
from smolvlm.model import SmolVLM
from smolvlm.precision import has_fp8
from smolvlm.sampling import choose_tokens
from smolvlm.text import rotary_table, rotate

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
HAS_FP8 = INTERPRETED or (torch.cuda.is_available() and has_fp8(DEVICE))
TEXT = TextConfig(8, 8, 2, 9, 3, 64, 8, 1e4, 64, 1e-5)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}

pytestmark = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device")
needs_fp8 = pytest.mark.skipif(not HAS_FP8, reason="needs a GPU of compute capability 8.9")
dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE))


def _noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def _assert_close(ours: Tensor, plain: Tensor) -> None:
    tolerance = TOLERANCE[plain.dtype]
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)


@dtypes
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("size", [48, 576])
@torch.inference_mode()
def test_a_sum_and_its_norm(kind: type[nn.LayerNorm | nn.RMSNorm], size: int, dtype: torch.dtype) -> None:
    norm = kind(size, eps=1e-5).to(DEVICE, dtype)
    for parameter in norm.parameters():
        parameter.copy_(_noise(size, dtype=dtype, seed=3))
    hidden, delta = _noise(2, 5, size, dtype=dtype), _noise(2, 5, size, dtype=dtype, seed=1)
    _assert_close(add_and_norm(hidden, None, norm), norm(hidden))
    total = hidden + delta
    _assert_close(add_and_norm(hidden, delta, norm), norm(total))
    _assert_close(hidden, total)


@dtypes
@torch.inference_mode()
def test_rotation_leaves_the_values(dtype: torch.dtype) -> None:
    cos, sin = (table.to(DEVICE) for table in rotary_table(TEXT))
    heads, positions = _noise(7, 15, 64, dtype=dtype), torch.tensor([0, 5, 63, 1, 1, 2, 40], device=DEVICE)
    turned = rotate(heads[:, :12].float(), cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)).to(dtype)
    expected = torch.cat([turned, heads[:, 12:]], dim=1)
    rotate_in_place(heads, 12, positions, cos, sin)
    _assert_close(heads, expected)


@dtypes
@torch.inference_mode()
def test_gate(dtype: torch.dtype) -> None:
    gate_up = _noise(3, 2 * 1500, dtype=dtype)
    gate, up = gate_up.float().chunk(2, dim=1)
    _assert_close(silu_and_multiply(gate_up), (F.silu(gate) * up).to(dtype))


@dtypes
@pytest.mark.parametrize("size", [70, 9000])
@torch.inference_mode()
def test_the_likeliest_of_equals_is_the_first(size: int, dtype: torch.dtype) -> None:
    logits = _noise(6, size, dtype=dtype)
    logits[0, [3, 60]] = 9.0
    logits[1] = 0.0
    logits[2, -1] = 9.0
    logits[3] -= 200.0
    tokens, logprobs = choose_likeliest(logits)
    assert tokens.tolist() == logits.argmax(dim=-1).tolist()
    assert tokens[:3].tolist() == [3, 0, size - 1]
    expected = logits.float().log_softmax(dim=-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> SmolVLM:
    return SmolVLM.from_pretrained(tiny_checkpoint, DEVICE, torch.float32)


@torch.inference_mode()
def test_patches_and_encoder(model: SmolVLM) -> None:
    side, embedding = model.config.vision.image_size, model.vision.embedding
    pixels = (torch.arange(2 * side * side * 3) * 37 % 256).to(torch.uint8).view(2, side, side, 3).to(DEVICE)
    plain = embedding(pixels)
    _assert_close(embedding.projection(cut_and_normalise(pixels, embedding)) + embedding.positions.weight, plain)
    torch.testing.assert_close(
        FusedSmolVLM(model).encode_tiles(pixels), model.encode_tiles(pixels), rtol=1e-3, atol=1e-4
    )


@needs_fp8
@torch.inference_mode()
def test_encoder_in_8_bit_floats() -> None:
    """Of the bundled model, whose sizes the products take; bfloat16, as on a GPU. Inputs are rounded from values that
    differ a little between the two, and a rounding is a sixteenth at most."""
    model = SmolVLM.from_pretrained(BUNDLED_DIRECTORY, DEVICE, torch.bfloat16)
    quantize_encoder(model)
    side = model.config.vision.image_size
    pixels = (torch.arange(side * side * 3) * 37 % 256).to(torch.uint8).view(1, side, side, 3).to(DEVICE)
    plain, ours = model.encode_tiles(pixels), FusedSmolVLM(model).encode_tiles(pixels)
    assert (ours - plain).norm() < 0.05 * plain.norm()


@dtypes
@needs_fp8
def test_rows_are_rounded_as_torch_does(dtype: torch.dtype) -> None:
    values = _noise(2, 5, 100, dtype=dtype) * torch.tensor([1e-4, 0.1, 1.0, 30.0, 0.0], device=DEVICE).view(1, 5, 1)
    values = values.to(dtype)
    (ours, our_scales), (plain, scales) = quantize_rows(values), quantized_rows(values)
    torch.testing.assert_close(our_scales, scales, rtol=1e-6, atol=0)
    assert (ours.float() == plain.float()).float().mean() > 0.99  # a scale may differ by its last bit
    torch.testing.assert_close(ours.float() * our_scales, plain.float() * scales, rtol=0.13, atol=1e-9)


@torch.inference_mode()
def test_logits_of_packed_prompts(model: SmolVLM) -> None:
    lengths, fused = (5, 9, 1), FusedSmolVLM(model)
    ids = torch.arange(15, device=DEVICE) * 7 % 50
    last, attention = torch.tensor([4, 13, 14], device=DEVICE), packed_prefill(lengths, DEVICE)
    plain = model(model.embed(ids), attention, last)
    ours = fused(model.embed(ids), attention, last)
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)
    assert fused.choose(ours, None, None)[0].tolist() == choose_tokens(plain, None, None)[0].tolist()


@dtypes
@torch.inference_mode()
def test_linear_with_tanh_gelu(dtype: torch.dtype) -> None:
    linear, inputs = nn.Linear(64, 128).to(DEVICE, dtype), _noise(2, 16, 64, dtype=dtype)
    _assert_close(linear_gelu(inputs, linear), F.gelu(linear(inputs), approximate="tanh"))


@pytest.mark.skipif(not can_pack_sequences(DEVICE, torch.bfloat16), reason="needs a CUDA device")
@torch.inference_mode()
def test_packed_attention_sees_its_own_sequence_alone() -> None:
    lengths = (70, 1, 200)
    q = _noise(sum(lengths), 9, 64, dtype=torch.bfloat16)
    k, v = _noise(sum(lengths), 2, 3, 64, dtype=torch.bfloat16, seed=1).unbind(1)
    starts = torch.tensor([0, 70, 71, 271], dtype=torch.int32, device=DEVICE)
    parts = zip(*(tensor.split(lengths) for tensor in (q, k, v)), strict=True)
    expected = torch.cat([causal_attention(*part) for part in parts])
    _assert_close(packed_attention(q, k, v, starts, max(lengths)), expected)
