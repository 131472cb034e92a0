"""Transformer blocks in 8-bit integers, for inference: two native calls a block, with the attention between them.

Norms, biases, activations, rotary positions and residuals happen inside the products: torch would send each of them
over memory again, and at the batch of a decode step spend more time on starting them than on the work.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smolvlm.attention import Attention
from smolvlm.cpu.attention import DTYPES
from smolvlm.cpu.linear import BLOCK, VECTOR, Int8Linear, NativeNorm, has_int8, interleaved, product, tail
from smolvlm.dense_attention import dense_attention
from smolvlm.precision import name_of
from smolvlm.text import TextLayer
from smolvlm.vision import VisionLayer

HEAD_DIM = BLOCK  # a block of columns is a head, turned where it is computed


class Int8VisionLayer(nn.Module):
    """VisionLayer [N, P, H] → [N, P, H]."""

    def __init__(self, layer: VisionLayer) -> None:
        super().__init__()
        attention, mlp = layer.attention, layer.mlp
        self.heads = (3, attention.num_heads, attention.head_dim)
        self.attention_norm, self.mlp_norm = NativeNorm(layer.attention_norm), NativeNorm(layer.mlp_norm)
        self.qkv, self.output = _linear(attention.qkv), _linear(attention.output)
        self.mlp = _linear(mlp.up), _linear(mlp.down)

    def forward(self, hidden: Tensor) -> Tensor:
        qkv = product(hidden, self.qkv, self.attention_norm).unflatten(-1, self.heads)  # [N, P, 3, heads, D]
        attended = dense_attention(*(part.transpose(1, 2) for part in qkv.unbind(2)))
        return tail(attended.transpose(1, 2).flatten(2), hidden, self.output, self.mlp_norm, self.mlp)


class Int8TextLayer(nn.Module):
    """TextLayer [T, H] → [T, H]."""

    def __init__(self, layer: TextLayer) -> None:
        super().__init__()
        attention, mlp = layer.attention, layer.mlp
        self.num_heads, self.num_kv_heads = attention.num_heads, attention.num_kv_heads
        self.attention_norm, self.mlp_norm = NativeNorm(layer.attention_norm), NativeNorm(layer.mlp_norm)
        self.qkv, self.output = _linear(attention.qkv), _linear(attention.output)
        self.mlp = Int8Linear(interleaved(mlp.gate_up.weight), None), _linear(mlp.down)

    def forward(self, hidden: Tensor, layer: int, rotary: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        turned = (*rotary, self.num_heads + self.num_kv_heads)
        heads = product(hidden, self.qkv, self.attention_norm, turned).unflatten(-1, (-1, HEAD_DIM))
        q, kv = heads.split([self.num_heads, 2 * self.num_kv_heads], dim=1)
        attended = attention.attend(layer, q, kv.unflatten(1, (2, self.num_kv_heads)))
        return tail(attended.flatten(1), hidden, self.output, self.mlp_norm, self.mlp)


def check_int8(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError unless this device and processor can run it with hidden states of `dtype`."""
    if device.type != "cpu" or dtype not in DTYPES:
        raise ValueError(
            f"quantization 'int8' runs on a CPU in float32 or bfloat16, not on {device} in {name_of(dtype)}"
        )
    if not has_int8():
        raise ValueError("quantization 'int8' needs a C++ compiler (g++) and a processor with AVX2; leave it out here")


def quantize_layers(model: nn.Module) -> None:
    """Replace the blocks of a model, one after the other: memory grows by one block only.

    What leads into them and out of them (patches, connector, embeddings, head) keeps its dtype.

    Raises:
        ValueError: a block has sizes that the native products do not take.
    """
    if not _can_quantize(model):
        raise ValueError("quantization 'int8' wants text heads of 64 and layers whose sizes are multiples of 16")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, VisionLayer):
                setattr(module, name, Int8VisionLayer(child))
            elif isinstance(child, TextLayer):
                setattr(module, name, Int8TextLayer(child))


def _linear(linear: nn.Module) -> Int8Linear:
    assert isinstance(linear, nn.Linear), "packed layers keep no weights to round"
    return Int8Linear(linear.weight, linear.bias)


def _can_quantize(model: nn.Module) -> bool:
    blocks = [each for each in model.modules() if isinstance(each, (VisionLayer, TextLayer))]
    linears = [each for block in blocks for each in block.modules() if isinstance(each, nn.Linear)]
    heads = {block.attention.head_dim for block in blocks if isinstance(block, TextLayer)}
    return heads <= {HEAD_DIM} and not any(each.in_features % VECTOR or each.out_features % VECTOR for each in linears)
