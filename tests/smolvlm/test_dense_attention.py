import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from smolvlm.dense_attention import _plain, dense_attention, later_keys


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


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_in_float32_training_takes_the_fused_one(num_kv_heads: int, is_causal: bool, fused_calls: list[bool]) -> None:
    q, k, v = heads(num_kv_heads)
    ours = dense_attention(q, k, v, is_causal)
    assert fused_calls == [is_causal]
    same_with_gradients(ours, textbook(q, k, v, is_causal), q, k, v)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_in_bfloat16_training_takes_the_plain_one(num_kv_heads: int, is_causal: bool, fused_calls: list[bool]) -> None:
    q, k, v = heads(num_kv_heads, torch.bfloat16)
    ours = dense_attention(q, k, v, is_causal)
    assert fused_calls == []
    same_with_gradients(ours, textbook(q, k, v, is_causal), q, k, v, tolerance=0.05)


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_plain_one_is_the_fused_one(is_causal: bool) -> None:
    """In float32, where rounding hides nothing."""
    q, k, v = heads(4)
    same_with_gradients(
        _plain(q, k, v, is_causal), F.scaled_dot_product_attention(q, k, v, is_causal=is_causal), q, k, v
    )


def same_with_gradients(ours: Tensor, expected: Tensor, *inputs: Tensor, tolerance: float | None = None) -> None:
    """As near as torch expects of the dtype, or `tolerance`."""
    torch.testing.assert_close(ours.to(expected.dtype), expected, atol=tolerance, rtol=tolerance)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((out * weight).sum(), inputs) for out in (ours, expected)]
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
