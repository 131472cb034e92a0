"""The shape of a checkpoint, read from its own files: `config.json` and `preprocessor_config.json` decide."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolvlm.hub import resolve_checkpoint

END_OF_UTTERANCE = "<end_of_utterance>"
LANCZOS = 1


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP encoder. Sizes are pixels (`image_size`, `patch_size`) or channels."""

    image_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_channels: int
    layer_norm_eps: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class TextConfig:
    """Llama decoder. `max_positions` is the longest context in tokens, prompt and answer together."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rope_theta: float
    max_positions: int
    rms_norm_eps: float


@dataclass(frozen=True)
class ImageConfig:
    """How the checkpoint wants its images: `preprocessor_config.json`.

    `tile_size` is the side of a tile in pixels (max_image_size.longest_edge), `longest_edge` the edge that an image is
    resized to before it is cut into tiles (size.longest_edge); `mean` and `std` are per channel, for pixels in 0..1.
    """

    tile_size: int
    longest_edge: int
    do_image_splitting: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def from_pretrained(cls, path: str | Path, revision: str | None = None) -> "ImageConfig":
        """Read it from a checkpoint directory or hub id. Needs neither torch nor transformers. Raises ValueError."""
        directory = resolve_checkpoint(str(path), revision)
        raw = _image_processor(directory)
        resample = raw.get("resample", LANCZOS)
        if resample != LANCZOS:
            raise ValueError(
                f"{directory}: resample {resample!r} in preprocessor_config.json: only 1 (LANCZOS) is known"
            )
        return cls(
            tile_size=int(raw["max_image_size"]["longest_edge"]),
            longest_edge=int(raw["size"]["longest_edge"]),
            do_image_splitting=bool(raw.get("do_image_splitting", True)),
            mean=_three(raw["image_mean"]),
            std=_three(raw["image_std"]),
        )


@dataclass(frozen=True)
class ModelConfig:
    """A whole SmolVLM checkpoint.

    `scale_factor` is the side of the pixel shuffle's block; `eos_token_ids` are all tokens that end an answer: those of
    config.json and generation_config.json, and `<end_of_utterance>`.
    """

    vision: VisionConfig
    text: TextConfig
    image: ImageConfig
    scale_factor: int
    image_token_id: int
    eos_token_ids: tuple[int, ...]
    tie_word_embeddings: bool

    @property
    def image_seq_len(self) -> int:
        """Tokens of one tile in the text model."""
        return (self.vision.image_size // self.vision.patch_size // self.scale_factor) ** 2

    @classmethod
    def from_pretrained(cls, path: str | Path, revision: str | None = None) -> "ModelConfig":
        """Read a checkpoint directory or hub id (`revision`: its 40-hex commit).

        Keys that a published config leaves out take the defaults of transformers' Idefics3Config or SmolVLMConfig.
        Raises ValueError for an architecture, activation or RoPE variant that this package does not compute.
        """
        directory = resolve_checkpoint(str(path), revision)
        raw = _read_json(directory / "config.json")
        full = _with_defaults(raw, directory)
        return cls(
            vision=_vision_config(full["vision_config"]),
            text=_text_config(full["text_config"], _rope_theta(raw.get("text_config") or {})),
            image=ImageConfig.from_pretrained(directory),
            scale_factor=full["scale_factor"],
            image_token_id=full["image_token_id"],
            eos_token_ids=_eos_token_ids(directory, raw),
            tie_word_embeddings=bool(full["tie_word_embeddings"]),
        )


def _with_defaults(raw: dict[str, Any], directory: Path) -> dict[str, Any]:
    from transformers import Idefics3Config, SmolVLMConfig

    classes = {"idefics3": Idefics3Config, "smolvlm": SmolVLMConfig}
    model_type = raw.get("model_type")
    if model_type not in classes:
        raise ValueError(f"{directory}: model_type {model_type!r} is not a SmolVLM; expected idefics3 or smolvlm")
    full: dict[str, Any] = classes[model_type].from_dict(raw).to_dict()
    return full


def _vision_config(raw: Mapping[str, Any]) -> VisionConfig:
    _require(raw, "vision_config", "hidden_act", "gelu_pytorch_tanh")
    return VisionConfig(
        image_size=_square(raw, "image_size"),
        patch_size=_square(raw, "patch_size"),
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        num_channels=raw["num_channels"],
        layer_norm_eps=raw["layer_norm_eps"],
    )


def _text_config(raw: Mapping[str, Any], rope_theta: float) -> TextConfig:
    _require(raw, "text_config", "model_type", "llama")
    _require(raw, "text_config", "hidden_act", "silu")
    _require(raw, "text_config", "attention_bias", False)
    _require(raw, "text_config", "mlp_bias", False)
    return TextConfig(
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw["num_key_value_heads"] or raw["num_attention_heads"],
        head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        vocab_size=raw["vocab_size"],
        rope_theta=rope_theta,
        max_positions=raw["max_position_embeddings"],
        rms_norm_eps=raw["rms_norm_eps"],
    )


def _rope_theta(text: Mapping[str, Any]) -> float:
    """Newer configs keep theta in rope_parameters, older ones beside rope_scaling; both may name a variant we refuse.

    Read from the file itself: a library's default (10000) in place of a missing theta gives fluent nonsense.
    """
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise ValueError(f"text_config.rope_parameters.rope_type {rope_type!r} is not supported; only 'default' is")
    theta = rope.get("rope_theta", text.get("rope_theta"))
    if theta is None:
        raise ValueError("text_config names no rope_theta; put it into text_config.rope_parameters")
    return float(theta)


def _eos_token_ids(directory: Path, raw: Mapping[str, Any]) -> tuple[int, ...]:
    found: set[int] = set()
    generation = directory / "generation_config.json"
    sources = [raw, raw.get("text_config") or {}, _read_json(generation) if generation.exists() else {}]
    for source in sources:
        eos = source.get("eos_token_id")
        found.update([] if eos is None else eos if isinstance(eos, list) else [eos])
    tokenizer = directory / "tokenizer.json"
    added = _read_json(tokenizer)["added_tokens"] if tokenizer.exists() else []
    found.update(token["id"] for token in added if token["content"] == END_OF_UTTERANCE)
    return tuple(sorted(found))


def _image_processor(directory: Path) -> dict[str, Any]:
    """transformers 5 writes the image processor into processor_config.json when it saves a whole processor."""
    own = directory / "preprocessor_config.json"
    if own.exists():
        return _read_json(own)
    whole = directory / "processor_config.json"
    nested = _read_json(whole).get("image_processor") if whole.exists() else None
    if nested is None:
        raise ValueError(f"{directory} has no preprocessor_config.json; it is not a complete SmolVLM checkpoint")
    return dict(nested)


def _require(raw: Mapping[str, Any], section: str, key: str, expected: object) -> None:
    if raw[key] != expected:
        raise ValueError(f"{section}.{key} is {raw[key]!r}; this model computes only {expected!r}")


def _square(raw: Mapping[str, Any], key: str) -> int:
    value = raw[key]
    if not isinstance(value, int):
        raise ValueError(f"vision_config.{key} is {value!r}; only square sizes (one integer) are supported")
    return value


def _three(values: list[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return float(red), float(green), float(blue)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; {path.parent} is not a complete SmolVLM checkpoint") from None
    return loaded
