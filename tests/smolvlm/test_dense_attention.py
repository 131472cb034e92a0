import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from smolvlm.dense_attention import dense_attention, later_keys


def heads(num_kv_heads: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_kv_heads)
    sizes = [(2, count, 7, 16) for count in (4, num_kv_heads, num_kv_heads)]
    return [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes]


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What torch's fused operator was called with: is_causal, a call."""
    calls: list[bool] = []
    fused = F.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, enable_gqa: bool) -> Tensor:
        calls.append(is_causal)
        return fused(q, k, v, is_causal=is_causal, enable_gqa=enable_gqa)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    return calls


def textbook(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    q, k, v = q.float(), *(t.float().repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if is_causal:
        scores = scores.masked_fill(later_keys(q.shape[-2], q.device), -torch.inf)
    attended: Tensor = scores.softmax(-1) @ v
    return attended


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_training_has_the_textbook_s_values_and_gradients(
    num_kv_heads: int, is_causal: bool, dtype: torch.dtype, fused_calls: list[bool]
) -> None:
    """In float32 with torch's fused operator, in bfloat16 without."""
    q, k, v = heads(num_kv_heads, dtype)
    ours, expected = dense_attention(q, k, v, is_causal), textbook(q, k, v, is_causal)
    assert fused_calls == ([is_causal] if dtype == torch.float32 else [])
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(ours.float(), expected, atol=tolerance, rtol=tolerance)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (ours, expected)]
    torch.testing.assert_close(*gradients, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_without_gradients_it_is_the_fused_one(num_kv_heads: int, is_causal: bool, fused_calls: list[bool]) -> None:
    q, k, v = heads(num_kv_heads)
    expected = textbook(q, k, v, is_causal)
    with torch.no_grad():
        torch.testing.assert_close(dense_attention(q, k, v, is_causal), expected)
    torch.testing.assert_close(dense_attention(q.detach(), k.detach(), v.detach(), is_causal), expected)
    assert fused_calls == [is_causal] * 2


def test_bfloat16_stays_bfloat16() -> None:
    q, k, v = heads(2, torch.bfloat16)
    out = dense_attention(q, k, v, is_causal=True)
    assert out.dtype == torch.bfloat16
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out.float(), expected, atol=0.02, rtol=0.02)


def test_later_keys() -> None:
    assert later_keys(3, torch.device("cpu")).tolist() == [[False, True, True], [False, False, True], [False] * 3]


def test_under_autocast_it_computes_in_the_dtype_of_the_values() -> None:
    """Rotated queries and keys are float32 there."""
    q, k, v = heads(2)
    with torch.autocast("cpu", torch.bfloat16):
        out = dense_attention(q, k, v.bfloat16(), is_causal=True)
    assert out.dtype == torch.bfloat16
    expected = dense_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), is_causal=True)
    torch.testing.assert_close(out, expected, atol=0.02, rtol=0.02)
