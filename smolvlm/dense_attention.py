"""Self-attention over whole sequences, for inference and training: [B, heads, T, D] → [B, heads, T, D]."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from smolvlm.cpu.attention import encoder_attention


def dense_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    """Attention without padding. q is [B, heads, T, D]; k and v may have fewer heads, each serving a group of q's.

    torch's fused operator everywhere but on a CPU in bfloat16. Where gradients flow, its backward pass takes about
    twice the time of the plain products there (measured: 16 tiles of 256 patches, 3 heads of 64: 25 against 11 ms); in
    float32 it skips half of a causal one's (24 sequences of 370, 6 heads on 3, both passes: 97 against 144 ms). In
    inference without AMX it takes twice the time of our own (1024 patches, 12 heads of 64: 23 against 11 ms).
    """
    grouped = q.shape[1] != k.shape[1]
    if not (is_causal or torch.is_grad_enabled()):
        attended = encoder_attention(q, k, v)
        if attended is not None:
            return attended
    if q.device.type == "cpu" and v.dtype == torch.bfloat16 and torch.is_grad_enabled() and q.requires_grad:
        return _plain(q, *((_repeated(k, q), _repeated(v, q)) if grouped else (k, v)), is_causal)
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=grouped)


def _plain(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    """All in the dtype of v: autocast would copy the scores, by far the largest tensors, to float32 and back."""
    q, k = (q / math.sqrt(q.shape[-1])).to(v.dtype), k.to(v.dtype)
    with torch.autocast(q.device.type, enabled=False):
        scores = q @ k.transpose(-1, -2)  # [B, heads, T, T]
        if is_causal:
            scores += _causal_bias(q)
        return scores.softmax(-1) @ v


def _causal_bias(q: Tensor) -> Tensor:
    """[T, T]: -inf where a key comes after its query. Adding it takes no backward pass over the scores; a mask does."""
    later = later_keys(q.shape[-2], q.device)
    return torch.zeros(later.shape, dtype=q.dtype, device=q.device).masked_fill_(later, -torch.inf)


def later_keys(num_tokens: int, device: torch.device) -> Tensor:
    """bool [T, T]: True where a key comes after its query."""
    return torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device).triu(1)


def _repeated(heads: Tensor, like: Tensor) -> Tensor:
    return heads.repeat_interleave(like.shape[1] // heads.shape[1], dim=1)
