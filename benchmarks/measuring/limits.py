"""What a device could do at best: the work of each phase over the rates that this run measures on it.

The rates are those of one large matrix product and of reading memory, in the dtype of the run, or of a product of 8-bit
integers for the weights that are. A phase takes at least its operations at the first rates or its bytes at the last;
the limit of a batch is the sum over its phases.
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
    """Operations a second with the weights of transformer blocks and with all else; bytes a second."""

    blocks: float
    flops: float
    bytes: float


@dataclass(frozen=True)
class Work:
    """Operations with the weights of transformer blocks, and all others."""

    blocks: float
    others: float

    def seconds(self, rates: Rates) -> float:
        return self.blocks / rates.blocks + self.others / rates.flops


@dataclass(frozen=True)
class Load:
    """A batch of images: tiles and prompt tokens of each, tokens generated for each."""

    batch: int
    tiles: int
    prompt_tokens: int
    tokens: int


def measure_rates(device: torch.device, dtype: torch.dtype, size: int, in_int8: bool = False) -> Rates:
    """Multiply two matrices of `size` and read one of 64 times as many values, beyond any cache from 1024 on."""
    with torch.inference_mode():
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        flops = 2 * size**3 / median_seconds(lambda: torch.mm(a, b), device, REPEATS)
        values = torch.ones(64 * size * size, device=device)
        bytes_read = values.nbytes / median_seconds(values.sum, device, REPEATS)
        return Rates(_int8_rate(device, size) if in_int8 else flops, flops, bytes_read)


def _int8_rate(device: torch.device, size: int) -> float:
    a, b = torch.randint(-127, 128, (2, size, size), device=device, dtype=torch.int8)
    return 2 * size**3 / median_seconds(lambda: torch._int_mm(a, b.t()), device, REPEATS)


def limit_seconds(
    config: ModelConfig, load: Load, dtype: torch.dtype, rates: Rates, in_int8: bool = False
) -> dict[str, float]:
    """The least seconds of each phase of this load."""
    steps = load.tokens - 1  # the first token comes from the prefill
    context = load.prompt_tokens + steps / 2
    step_bytes = decode_bytes(config, load.batch * context, dtype, in_int8)
    step = _text_work(config, load.batch, context, heads=load.batch)
    prompt = _text_work(config, load.prompt_tokens, load.prompt_tokens / 2, heads=1)
    return {
        "vision": load.batch * load.tiles * tile_work(config).seconds(rates),
        "prefill": load.batch * prompt.seconds(rates),
        "decode": steps * max(step.seconds(rates), step_bytes / rates.bytes),
    }


def decode_bytes(config: ModelConfig, tokens: float, dtype: torch.dtype, in_int8: bool = False) -> float:
    """What a decode step must read: the text model's weights once, and keys and values of so many tokens."""
    blocks = _text_weights(config) * (1 if in_int8 else dtype.itemsize)
    return blocks + _head_weights(config) * dtype.itemsize + tokens * KVCache.block_bytes(config.text, 1, dtype)


def tile_work(config: ModelConfig) -> Work:
    """Encoder and connector: every patch through the weights, and every patch against every other in each layer."""
    vision = config.vision
    patches, hidden = (vision.image_size // vision.patch_size) ** 2, vision.hidden_size
    weights = vision.num_layers * (4 * hidden**2 + 2 * hidden * vision.intermediate_size)
    embedding = vision.num_channels * vision.patch_size**2 * hidden
    pairs = 2 * vision.num_layers * patches * hidden
    return Work(2.0 * patches * weights, 2.0 * patches * (embedding + pairs + hidden * config.text.hidden_size))


def _text_work(config: ModelConfig, tokens: float, context: float, heads: int) -> Work:
    """So many tokens that see `context` others, and the head for `heads` of them."""
    text = config.text
    attention = 4 * text.num_layers * text.num_heads * text.head_dim * context
    return Work(2 * tokens * _text_weights(config), tokens * attention + 2 * heads * _head_weights(config))


def _text_weights(config: ModelConfig) -> int:
    text = config.text
    attention = (2 * text.num_heads + 2 * text.num_kv_heads) * text.head_dim
    return text.num_layers * text.hidden_size * (attention + 3 * text.intermediate_size)


def _head_weights(config: ModelConfig) -> int:
    return config.text.hidden_size * config.text.vocab_size
