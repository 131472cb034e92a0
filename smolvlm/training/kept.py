"""Weights that a new model takes over from a trained one: whole parts, into a shape that may be deeper or see more."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from smolvlm.training.plan import Part
from smolvlm.weights import read_tensors

PUBLISHED: dict[Part, tuple[str, ...]] = {
    "vision": ("model.vision_model.",),
    "connector": ("model.connector.",),
    "text": ("model.text_model.", "lm_head."),
}
LAYER = re.compile(r"(?P<stack>model\.(?:vision_model\.encoder|text_model)\.layers\.)(?P<number>\d+)\.")
RESIDUAL = ("out_proj.weight", "o_proj.weight", "fc2.weight", "down_proj.weight")
POSITIONS = "position_embedding.weight"


def kept_weights(directory: Path, parts: Collection[Part], fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of `parts` for a model whose fresh ones are given, from the checkpoint in `directory`; float32.

    Layers that the checkpoint lacks become identities: what they add to the residual stream is 0 until they are
    trained. Positions of another number of patches are interpolated, as one stretches the picture that they cover.
    Raises ValueError, naming the tensor, where the rest does not fit.
    """
    prefixes = tuple(prefix for part in parts for prefix in PUBLISHED[part])
    trained = {key: tensor.float() for _, key, tensor in read_tensors(directory) if key.startswith(prefixes)}
    depths = _depths(trained)
    kept = {key: _fitted(key, like, trained, depths) for key, like in fresh.items() if key.startswith(prefixes)}
    for key in sorted(trained.keys() | kept.keys()):
        found, made = trained.get(key), kept.get(key)
        if made is None or made.shape != fresh[key].shape:
            wanted = fresh.get(key)
            raise ValueError(
                f"{directory}: {key!r} has shape {_size(found)}, start.shape asks for {_size(wanted)}; write the "
                "shape of the checkpoint, with as many layers or more, or leave the part out of start.keep"
            )
    return {key: tensor for key, tensor in kept.items() if tensor is not None}


def _fitted(key: str, like: Tensor, trained: Mapping[str, Tensor], depths: Mapping[str, int]) -> Tensor | None:
    layer = LAYER.match(key)
    if layer and int(layer["number"]) >= depths.get(layer["stack"], 0):
        return like * 0.0 if key.endswith(RESIDUAL) else like
    tensor = trained.get(key)
    if tensor is not None and key.endswith(POSITIONS) and tensor.shape[1:] == like.shape[1:]:
        return stretched_positions(tensor, len(like))
    return tensor


def _depths(trained: Mapping[str, Tensor]) -> dict[str, int]:
    """How many layers each stack has."""
    depths: dict[str, int] = {}
    for layer in filter(None, map(LAYER.match, trained)):
        depths[layer["stack"]] = max(depths.get(layer["stack"], 0), int(layer["number"]) + 1)
    return depths


def stretched_positions(positions: Tensor, num_patches: int) -> Tensor:
    """Positions [P, H] of a square of patches → [num_patches, H] of a finer or coarser one over the same picture."""
    if len(positions) == num_patches:
        return positions
    side, wanted = math.isqrt(len(positions)), math.isqrt(num_patches)
    grid = positions.T.reshape(1, -1, side, side)
    return F.interpolate(grid, size=(wanted, wanted), mode="bicubic", align_corners=False)[0].flatten(1).T.contiguous()


def _size(tensor: Tensor | None) -> list[int] | None:
    return None if tensor is None else list(tensor.shape)
