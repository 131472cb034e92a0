"""What a device could do at best: the work of each phase over the rates that this run measures on it.

The rates are those of one large matrix product and of reading memory, in the dtype of the run. A phase takes at least
its operations at the first rate or its bytes at the second; the limit of a batch is the sum over its phases.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from measuring.timing import median_seconds

from smolvlm.attention import KVCache
from smolvlm.config import ModelConfig

REPEATS = 5


@dataclass(frozen=True)
class Rates:
    """Operations and bytes a second."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Load:
    """A batch of images: tiles and prompt tokens of each, tokens generated for each."""

    batch: int
    tiles: int
    prompt_tokens: int
    tokens: int


def measure_rates(device: torch.device, dtype: torch.dtype, size: int) -> Rates:
    """Multiply two matrices of `size` and read one of 64 times as many values, beyond any cache from 1024 on."""
    with torch.inference_mode():
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        flops = 2 * size**3 / median_seconds(lambda: torch.mm(a, b), device, REPEATS)
        values = torch.ones(64 * size * size, device=device)
        return Rates(flops, values.nbytes / median_seconds(values.sum, device, REPEATS))


def limit_seconds(config: ModelConfig, load: Load, dtype: torch.dtype, rates: Rates) -> dict[str, float]:
    """The least seconds of each phase of this load."""
    steps = load.tokens - 1  # the first token comes from the prefill
    context = load.prompt_tokens + steps / 2
    step_bytes = decode_bytes(config, load.batch * context, dtype)
    step_flops = load.batch * (_token_flops(config, context) + 2 * _head_weights(config))
    prompt = load.prompt_tokens * _token_flops(config, load.prompt_tokens / 2) + 2 * _head_weights(config)
    return {
        "vision": load.batch * load.tiles * tile_flops(config) / rates.flops,
        "prefill": load.batch * prompt / rates.flops,
        "decode": steps * max(step_flops / rates.flops, step_bytes / rates.bytes),
    }


def decode_bytes(config: ModelConfig, tokens: float, dtype: torch.dtype) -> float:
    """What a decode step must read: the text model's weights once, and keys and values of so many tokens."""
    weights = _text_weights(config) + _head_weights(config)
    return weights * dtype.itemsize + tokens * KVCache.block_bytes(config.text, 1, dtype)


def tile_flops(config: ModelConfig) -> float:
    """Encoder and connector: every patch through the weights, and every patch against every other in each layer."""
    vision = config.vision
    patches, hidden = (vision.image_size // vision.patch_size) ** 2, vision.hidden_size
    weights = vision.num_layers * (4 * hidden**2 + 2 * hidden * vision.intermediate_size)
    embedding = vision.num_channels * vision.patch_size**2 * hidden
    pairs = 2 * vision.num_layers * patches * hidden
    return 2.0 * patches * (weights + embedding + pairs + hidden * config.text.hidden_size)


def _token_flops(config: ModelConfig, context: float) -> float:
    text = config.text
    return 2 * _text_weights(config) + 4 * text.num_layers * text.num_heads * text.head_dim * context


def _text_weights(config: ModelConfig) -> int:
    text = config.text
    attention = (2 * text.num_heads + 2 * text.num_kv_heads) * text.head_dim
    return text.num_layers * text.hidden_size * (attention + 3 * text.intermediate_size)


def _head_weights(config: ModelConfig) -> int:
    return config.text.hidden_size * config.text.vocab_size
