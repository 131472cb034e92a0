"""Checkpoint keys as data: a table names the published keys behind our parameters; loading and saving follow it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from smolvlm.config import ModelConfig
from smolvlm.packed import PackedLinear

if TYPE_CHECKING:
    from smolvlm.model import SmolVLM

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HEAD_KEY = "lm_head.weight"
EMBEDDING_KEY = "model.text_model.embed_tokens.weight"

_VISION = "model.vision_model"
_VISION_LAYER = f"{_VISION}.encoder.layers.*"
_TEXT = "model.text_model"
_TEXT_LAYER = f"{_TEXT}.layers.*"

# Our module → the published modules whose rows it holds, one below the other. `*` is the layer's number.
PUBLISHED_MODULES: dict[str, tuple[str, ...]] = {
    "vision.embedding.projection": (f"{_VISION}.embeddings.patch_embedding",),
    "vision.embedding.positions": (f"{_VISION}.embeddings.position_embedding",),
    "vision.layers.*.attention_norm": (f"{_VISION_LAYER}.layer_norm1",),
    "vision.layers.*.attention.qkv": tuple(f"{_VISION_LAYER}.self_attn.{part}_proj" for part in "qkv"),
    "vision.layers.*.attention.output": (f"{_VISION_LAYER}.self_attn.out_proj",),
    "vision.layers.*.mlp_norm": (f"{_VISION_LAYER}.layer_norm2",),
    "vision.layers.*.mlp.up": (f"{_VISION_LAYER}.mlp.fc1",),
    "vision.layers.*.mlp.down": (f"{_VISION_LAYER}.mlp.fc2",),
    "vision.norm": (f"{_VISION}.post_layernorm",),
    "connector.projection": ("model.connector.modality_projection.proj",),
    "text.embedding": (f"{_TEXT}.embed_tokens",),
    "text.layers.*.attention_norm": (f"{_TEXT_LAYER}.input_layernorm",),
    "text.layers.*.attention.qkv": tuple(f"{_TEXT_LAYER}.self_attn.{part}_proj" for part in "qkv"),
    "text.layers.*.attention.output": (f"{_TEXT_LAYER}.self_attn.o_proj",),
    "text.layers.*.mlp_norm": (f"{_TEXT_LAYER}.post_attention_layernorm",),
    "text.layers.*.mlp.gate_up": (f"{_TEXT_LAYER}.mlp.gate_proj", f"{_TEXT_LAYER}.mlp.up_proj"),
    "text.layers.*.mlp.down": (f"{_TEXT_LAYER}.mlp.down_proj",),
    "text.norm": (f"{_TEXT}.norm",),
    "head": ("lm_head",),
}


def load_weights(model: SmolVLM, directory: Path) -> None:
    """Copy every tensor of a checkpoint into the model, one at a time, converting to the model's dtype.

    Peak memory is the model and one tensor. `lm_head.weight` may be absent where the config ties it to the embedding;
    if it is there all the same, it must equal the embedding.

    Raises:
        ValueError: a key is missing, unexpected, of another shape, or the files are incomplete; the message names it.
    """
    views = published_views(model)
    missing, tied_head = set(views), None
    for file, key, tensor in read_tensors(directory):
        if key == HEAD_KEY and model.config.tie_word_embeddings:
            tied_head = tensor
        elif key not in views:
            raise ValueError(f"{file}: unexpected key {key!r}; the config describes no such weight")
        else:
            _copy(file, key, tensor, views[key])
            missing.discard(key)
    if missing:
        first = min(missing)
        raise ValueError(f"{directory}: {len(missing)} of {len(views)} weights are missing, first {first!r}")
    if tied_head is not None:
        _check_tied(directory, tied_head, views[EMBEDDING_KEY])


def save_weights(model: SmolVLM, directory: Path, dtype: torch.dtype | None = None) -> Path:
    """Write the model's weights under their published keys, in `dtype` or the model's, to one `model.safetensors`."""
    path = directory / WEIGHTS_FILE
    tensors = {key: view.to("cpu", dtype).contiguous() for key, view in published_views(model).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def published_views(model: SmolVLM) -> dict[str, Tensor]:
    """Published key → view of our parameter, in the published shape. A tied head is the embedding and not listed."""
    assert not any(isinstance(module, PackedLinear) for module in model.modules()), "packed weights cannot be read back"
    views: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        module, kind = name.rsplit(".", 1)
        number = re.search(r"\.(\d+)\.", module)
        keys = PUBLISHED_MODULES[re.sub(r"\.\d+\.", ".*.", module)]
        parts = parameter.detach().split(_rows(model.config, module, parameter, len(keys)))
        for key, part in zip(keys, parts, strict=True):
            views[f"{key.replace('*', number[1] if number else '')}.{kind}"] = part
    patch = "model.vision_model.embeddings.patch_embedding.weight"
    vision = model.config.vision  # a Conv2d weight, where ours is that of a Linear over flattened patches
    views[patch] = views[patch].unflatten(1, (vision.num_channels, vision.patch_size, vision.patch_size))
    return views


def _rows(config: ModelConfig, module: str, parameter: Tensor, num_parts: int) -> list[int]:
    if module.startswith("text.") and module.endswith(".qkv"):
        return [heads * config.text.head_dim for heads in (config.text.num_heads, *[config.text.num_kv_heads] * 2)]
    return [len(parameter) // num_parts] * num_parts


def read_tensors(directory: Path) -> Iterator[tuple[Path, str, Tensor]]:
    """File, published key and tensor of every weight of a checkpoint, one at a time. Raises ValueError as above."""
    for file in _weight_files(directory):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (safe_open is no dict)
                yield file, key, opened.get_tensor(key)


def _weight_files(directory: Path) -> list[Path]:
    single, index = directory / WEIGHTS_FILE, directory / INDEX_FILE
    if single.exists():
        return [single]
    if not index.exists():
        raise ValueError(f"{directory} has neither {WEIGHTS_FILE} nor {INDEX_FILE}; only safetensors weights are read")
    files = sorted(
        directory / name for name in set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    )
    for file in files:
        if not file.exists():
            raise ValueError(f"{file} is named by {INDEX_FILE} but does not exist; the checkpoint is incomplete")
    return files


def _copy(file: Path, key: str, tensor: Tensor, view: Tensor) -> None:
    if tensor.shape != view.shape:
        raise ValueError(f"{file}: {key!r} has shape {list(tensor.shape)}, the config asks for {list(view.shape)}")
    view.copy_(tensor)


def _check_tied(directory: Path, head: Tensor, embedding: Tensor) -> None:
    if not torch.equal(head.to(embedding), embedding):
        raise ValueError(
            f"{directory}: the config ties {HEAD_KEY!r} to {EMBEDDING_KEY!r}, but the two differ; "
            "set tie_word_embeddings to false in config.json"
        )
