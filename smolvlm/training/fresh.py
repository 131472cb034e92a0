"""Fresh weights to train from: the published format, seeded, with a byte-level tokenizer.

`smolvlm.scratch.random_weights` is loud on purpose, for tests; these are quiet, so that training is stable from its
first step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers
from torch import Tensor

from smolvlm.scratch import Shape, weight_shapes, write_checkpoint
from smolvlm.training.kept import POSITIONS, RESIDUAL, kept_weights
from smolvlm.training.plan import Part
from smolvlm.vocabulary import ADDED_TOKENS, LEADING_TOKENS, assemble_tokenizer

PATCHES = "patch_embedding.weight"
INK = 3.0  # strokes cover a small part of a patch


def create_fresh_checkpoint(
    directory: Path, shape: Shape, seed: int, kept_from: Path | None = None, keep: Sequence[Part] = ("vision",)
) -> Path:
    """Write a checkpoint of `shape` into `directory`, its parts `keep` those of the checkpoint `kept_from`, if given.

    Raises ValueError where vocab_size is not the tokenizer's, or a part does not fit the shape.
    """
    tokenizer = byte_tokenizer()
    if shape.text.vocab_size != tokenizer.get_vocab_size():
        raise ValueError(
            f"start.shape.text.vocab_size is {shape.text.vocab_size}; the byte-level tokenizer of a fresh model has "
            f"{tokenizer.get_vocab_size()} tokens: write that"
        )
    weights = fresh_weights(shape, seed)
    if kept_from is not None:
        _check_vocabulary(kept_from, keep, tokenizer)
        weights |= kept_weights(kept_from, keep, weights)
    write_checkpoint(directory, shape, tokenizer, weights, "float32")
    return directory


def _check_vocabulary(directory: Path, keep: Sequence[Part], tokenizer: Tokenizer) -> None:
    if "text" in keep and Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"{directory}: its tokenizer is not the byte-level one of a fresh model, so its decoder cannot be kept; "
            "leave text out of start.keep"
        )


def byte_tokenizer() -> Tokenizer:
    """A byte is a token, and SmolVLM's special tokens: a character of the answer is one look at the picture.

    The one merge is that of two line breaks, which the prompt of a split image needs as one token.
    """
    vocabulary = {content: index for index, content in enumerate(LEADING_TOKENS)}
    for content in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[content] = len(vocabulary)
    newline = "Ċ"  # how byte-level vocabularies write \n
    vocabulary[2 * newline] = len(vocabulary)
    return assemble_tokenizer(vocabulary, [(newline, newline)], len(vocabulary))


NUM_TOKENS = len(LEADING_TOKENS) + 256 + 1 + len(ADDED_TOKENS)


def fresh_weights(shape: Shape, seed: int) -> dict[str, Tensor]:
    """Seeded float32 weights under the published names.

    Matrices have std 1/√inputs, those that end a residual branch 1/√(2 · layers) of it; norms are identities, biases
    zero. Positions are sines and cosines of row and column, so that attention knows neighbours from the start. The
    patch embedding is blind to plain paper (each filter sums to 0), which would drown the ink.
    """
    generator = torch.Generator().manual_seed(seed)
    return {name: _fresh(name, size, shape, generator) for name, size in weight_shapes(shape)}


def _fresh(name: str, size: tuple[int, ...], shape: Shape, generator: torch.Generator) -> Tensor:
    if name.endswith(POSITIONS):
        return grid_positions(*size)
    if len(size) == 1:
        return torch.full(size, 1.0 if "norm" in name and name.endswith("weight") else 0.0)
    std = 1.0 if "embed_tokens" in name else 1 / math.sqrt(math.prod(size[1:]))
    if name.endswith(RESIDUAL):
        layers = shape.vision if "vision_model" in name else shape.text
        std /= math.sqrt(2 * max(1, layers.num_hidden_layers))
    weights = torch.randn(size, generator=generator) * std
    return (weights - weights.mean(dim=(1, 2, 3), keepdim=True)) * INK if name.endswith(PATCHES) else weights


def grid_positions(num_patches: int, hidden_size: int) -> Tensor:
    """Sines and cosines of the row and the column of each patch, float32 [P, H]. H is a multiple of 4.

    Source: the 2-D embedding of MoCo v3, https://arxiv.org/abs/2104.02057.
    """
    side = math.isqrt(num_patches)
    frequencies = 1 / (2.0 * side) ** (torch.arange(hidden_size // 4) / (hidden_size // 4))
    row, col = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [place.flatten()[:, None] * frequencies for place in (row, col)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
