"""SmolVLM with the kernels of smolvlm.kernels.fused between its matrix products: what a GPU runs.

The weights are those of the plain model (smolvlm.model), which tests hold this one to; nothing is copied. The residual
sum travels as two tensors, what has been summed and what comes on top, so that the next norm adds them on its way.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from smolvlm.attention import Attention
from smolvlm.fp8 import Fp8Linear
from smolvlm.kernels.fused import (
    add_and_norm,
    choose_likeliest,
    cut_and_normalise,
    quantize_rows,
    rotate_in_place,
    silu_and_multiply,
)
from smolvlm.model import SmolVLM
from smolvlm.sampling import SamplingTensors, choose_tokens
from smolvlm.text import TextAttention, TextDecoder, TextLayer
from smolvlm.vision import VisionAttention, VisionEncoder, VisionLayer, VisionMLP

# cuDNN's attention is the fastest on recent GPUs, but takes neither float32 nor every head size.
BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class FusedSmolVLM:
    """The calls of SmolVLM that an engine makes, and the choice of tokens."""

    def __init__(self, model: SmolVLM) -> None:
        self.model = model
        self.config = model.config
        self.embed = model.embed

    def encode_tiles(self, pixels: Tensor) -> Tensor:
        """uint8 tiles [N, S, S, 3] → image token embeddings [N, image_seq_len, H]."""
        embeddings: Tensor = self.model.connector(encode(self.model.vision, pixels))
        return embeddings

    def __call__(self, embeddings: Tensor, attention: Attention, last: Tensor | None = None) -> Tensor:
        """Embeddings [T, H], which are used up → logits [T, V], or of the `last` positions [n] alone: [n, V]."""
        hidden, delta = decode(self.model.text, embeddings, attention)
        if last is not None:
            hidden, delta = hidden.index_select(0, last), delta.index_select(0, last)
        logits: Tensor = self.model.head(add_and_norm(hidden, delta, self.model.text.norm))
        return logits

    def choose(self, logits: Tensor, sampling: SamplingTensors | None, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
        """As smolvlm.sampling.choose_tokens."""
        return choose_likeliest(logits) if sampling is None else choose_tokens(logits, sampling, uniform)


def encode(vision: VisionEncoder, pixels: Tensor) -> Tensor:
    """Tiles [N, S, S, C] → [N, P, H], as VisionEncoder."""
    patches = cut_and_normalise(pixels, vision.embedding)
    hidden = vision.embedding.projection(patches) + vision.embedding.positions.weight
    delta = None
    for layer in cast("list[VisionLayer]", vision.layers):
        delta = attend_within(layer.attention, add_and_norm(hidden, delta, layer.attention_norm))
        delta = two_linears(layer.mlp, add_and_norm(hidden, delta, layer.mlp_norm))
    return add_and_norm(hidden, delta, vision.norm)


def attend_within(attention: VisionAttention, hidden: Tensor) -> Tensor:
    qkv = linear(attention.qkv, hidden).unflatten(-1, (3, attention.num_heads, attention.head_dim))
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # [N, heads, P, D] each
    with sdpa_kernel(BACKENDS, set_priority=True):
        attended = F.scaled_dot_product_attention(q, k, v)
    return linear(attention.output, attended.transpose(1, 2).flatten(2))


def two_linears(mlp: VisionMLP, hidden: Tensor) -> Tensor:
    inner = linear_gelu(hidden, mlp.up) if isinstance(mlp.up, nn.Linear) else mlp.activation(linear(mlp.up, hidden))
    return linear(mlp.down, inner)


def linear(layer: nn.Module, inputs: Tensor) -> Tensor:
    """A linear layer of the encoder; one in 8-bit floats has its inputs rounded in one pass."""
    output: Tensor = layer.product(*quantize_rows(inputs)) if isinstance(layer, Fp8Linear) else layer(inputs)
    return output


def linear_gelu(inputs: Tensor, linear: nn.Linear) -> Tensor:
    """tanh-GELU of a linear layer: on CUDA inside the product, where torch's operator means this GELU by `use_gelu`."""
    if not inputs.is_cuda:
        return F.gelu(linear(inputs), approximate="tanh")
    rows = torch._addmm_activation(linear.bias, inputs.flatten(0, -2), linear.weight.t(), use_gelu=True)
    return rows.unflatten(0, inputs.shape[:-1])


def decode(text: TextDecoder, embeddings: Tensor, attention: Attention) -> tuple[Tensor, Tensor]:
    """Embeddings [T, H] → the two parts of the hidden states before the final norm, as TextDecoder. Uses them up."""
    hidden, delta = embeddings, None
    for index, layer in enumerate(cast("list[TextLayer]", text.layers)):
        normed = add_and_norm(hidden, delta, layer.attention_norm)
        delta = attend(layer.attention, normed, index, text, attention)
        normed = add_and_norm(hidden, delta, layer.mlp_norm)
        delta = layer.mlp.down(silu_and_multiply(layer.mlp.gate_up(normed)))
    assert delta is not None, "a decoder has layers"
    return hidden, delta


def attend(layer: TextAttention, hidden: Tensor, index: int, text: TextDecoder, attention: Attention) -> Tensor:
    heads = layer.qkv(hidden).unflatten(-1, (-1, layer.head_dim))  # [T, heads + 2 * kv_heads, D]
    rotate_in_place(heads, layer.num_heads + layer.num_kv_heads, attention.positions, text.cos, text.sin)
    q, kv = heads.split([layer.num_heads, 2 * layer.num_kv_heads], dim=1)
    kv = kv.unflatten(1, (2, layer.num_kv_heads))  # keys beside values: no copy
    output: Tensor = layer.output(attention.attend(index, q, kv).flatten(1))
    return output
