"""A new checkpoint from nothing: a published shape, seeded random weights, the published file format.

transformers' `Idefics3ForConditionalGeneration` and `Engine` load the result alike. It serves tests and demos, and
training from scratch begins with it.
"""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from smolvlm.config import END_OF_UTTERANCE
from smolvlm.vocabulary import ADDED_TOKENS, BOS, FAKE, IMAGE, PAD, token_id, train_tokenizer

if TYPE_CHECKING:
    import torch

CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@dataclass(frozen=True)
class VisionShape:
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int


@dataclass(frozen=True)
class TextShape:
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float
    vocab_size: int


@dataclass(frozen=True)
class Shape:
    """All numbers of a checkpoint; field names are those of config.json. `longest_edge` in pixels."""

    vision: VisionShape
    text: TextShape
    scale_factor: int
    longest_edge: int

    @property
    def image_seq_len(self) -> int:
        return (self.vision.image_size // self.vision.patch_size // self.scale_factor) ** 2


SIGLIP_BASE = VisionShape(768, 3072, 12, 12, image_size=512, patch_size=16)
SIGLIP_SO400M = VisionShape(1152, 4304, 27, 16, image_size=384, patch_size=14)

SIZES = {
    "tiny": Shape(VisionShape(32, 64, 2, 2, 32, 8), TextShape(64, 128, 2, 4, 2, 16, 2048, 1e5, 640), 2, 128),
    "256m": Shape(SIGLIP_BASE, TextShape(576, 1536, 30, 9, 3, 64, 8192, 1e5, 49280), 4, 2048),
    "500m": Shape(SIGLIP_BASE, TextShape(960, 2560, 32, 15, 5, 64, 8192, 1e5, 49280), 4, 2048),
    "2.2b": Shape(SIGLIP_SO400M, TextShape(2048, 8192, 24, 32, 32, 64, 8192, 1.3e5, 49280), 3, 1536),
}


def create_checkpoint(
    directory: Path,
    size: str = "tiny",
    seed: int = 0,
    *,
    num_text_layers: int | None = None,
    num_vision_layers: int | None = None,
    tokenizer_file: Path | None = None,
    dtype: str = "float32",
) -> Path:
    """Write a checkpoint with random weights into `directory` and give it back.

    `size` is one of SIZES; fewer layers than the preset's may be asked for. The same arguments give the same bytes.
    Without `tokenizer_file` a compact tokenizer is trained on a built-in text; with one, the vocabulary has its size.
    `dtype` is float32, bfloat16 or float16, on disk. Raises ValueError for an unknown size.
    """
    if size not in SIZES:
        raise ValueError(f"size {size!r} is not one of {', '.join(SIZES)}")
    shape = SIZES[size]
    tokenizer = (
        train_tokenizer(shape.text.vocab_size - len(ADDED_TOKENS))
        if tokenizer_file is None
        else Tokenizer.from_file(str(tokenizer_file))
    )
    text = replace(
        shape.text,
        num_hidden_layers=shape.text.num_hidden_layers if num_text_layers is None else num_text_layers,
        vocab_size=tokenizer.get_vocab_size(),
    )
    vision_layers = shape.vision.num_hidden_layers if num_vision_layers is None else num_vision_layers
    shape = replace(shape, text=text, vision=replace(shape.vision, num_hidden_layers=vision_layers))
    write_checkpoint(directory, shape, tokenizer, random_weights(shape, seed), dtype)
    if tokenizer_file is not None:
        shutil.copyfile(tokenizer_file, directory / "tokenizer.json")
    return directory


def write_checkpoint(
    directory: Path, shape: Shape, tokenizer: Tokenizer, weights: "dict[str, torch.Tensor]", dtype: str
) -> None:
    """Write configs, tokenizer and weights in the published format; `weights` has the keys of `weight_shapes`."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    for name, content in _config_files(shape, tokenizer, dtype).items():
        (directory / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    tokenizer.save(str(directory / "tokenizer.json"))
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == dict(weight_shapes(shape))
    on_disk = {name: weight.to(getattr(torch, dtype)).contiguous() for name, weight in weights.items()}
    save_file(on_disk, directory / "model.safetensors", metadata={"format": "pt"})


def random_weights(shape: Shape, seed: int, prefixes: tuple[str, ...] = ("",)) -> "dict[str, torch.Tensor]":
    """Seeded weights in float32 under the published names; only those that begin with one of `prefixes`.

    Every matrix keeps the scale of what it multiplies (std 1/√inputs). Queries and keys are doubled, so that attention
    looks somewhere instead of averaging; biases and norms are not trivial, so that a test notices one left out. The
    logits then have a spread of 1, with clear winners, where the usual std of 0.02 gives near-ties.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(size, generator=generator) * _std(name, size) + _mean(name)
        for name, size in weight_shapes(shape)
        if name.startswith(prefixes)
    }


def _std(name: str, size: tuple[int, ...]) -> float:
    if len(size) == 1:
        return 0.1
    if "embed_tokens" in name or "position_embedding" in name:
        return 0.5
    gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
    return gain / math.sqrt(math.prod(size[1:]))


def _mean(name: str) -> float:
    return 1.0 if "norm" in name and name.endswith("weight") else 0.0


def weight_shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the checkpoint: its published name and its size."""
    vision, text = shape.vision, shape.text
    yield from _vision_shapes(vision)
    shuffled = vision.hidden_size * shape.scale_factor**2
    yield "model.connector.modality_projection.proj.weight", (text.hidden_size, shuffled)
    yield from _text_shapes(text)
    yield "lm_head.weight", (text.vocab_size, text.hidden_size)


def _vision_shapes(vision: VisionShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, ffn, patch = vision.hidden_size, vision.intermediate_size, vision.patch_size
    prefix = "model.vision_model."
    yield prefix + "embeddings.patch_embedding.weight", (hidden, 3, patch, patch)
    yield prefix + "embeddings.patch_embedding.bias", (hidden,)
    yield prefix + "embeddings.position_embedding.weight", ((vision.image_size // patch) ** 2, hidden)
    linears = {f"self_attn.{name}_proj": (hidden, hidden) for name in ("k", "v", "q", "out")}
    linears |= {"mlp.fc1": (ffn, hidden), "mlp.fc2": (hidden, ffn)}
    for layer in range(vision.num_hidden_layers):
        for name, size in linears.items():
            yield f"{prefix}encoder.layers.{layer}.{name}.weight", size
            yield f"{prefix}encoder.layers.{layer}.{name}.bias", size[:1]
        for norm in ("layer_norm1", "layer_norm2"):
            yield from _layer_norm(f"{prefix}encoder.layers.{layer}.{norm}", hidden)
    yield from _layer_norm(prefix + "post_layernorm", hidden)


def _layer_norm(prefix: str, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield prefix + ".weight", (hidden,)
    yield prefix + ".bias", (hidden,)


def _text_shapes(text: TextShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, ffn, prefix = text.hidden_size, text.intermediate_size, "model.text_model."
    queries, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    linears = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    yield prefix + "embed_tokens.weight", (text.vocab_size, hidden)
    for layer in range(text.num_hidden_layers):
        for name, size in linears.items():
            yield f"{prefix}layers.{layer}.{name}.weight", size
        yield f"{prefix}layers.{layer}.input_layernorm.weight", (hidden,)
        yield f"{prefix}layers.{layer}.post_attention_layernorm.weight", (hidden,)
    yield prefix + "norm.weight", (hidden,)


def _config_files(shape: Shape, tokenizer: Tokenizer, dtype: str) -> dict[str, dict[str, Any]]:
    roles = {"bos_token_id": BOS, "eos_token_id": END_OF_UTTERANCE, "pad_token_id": PAD}
    ids = {role: token_id(tokenizer, content) for role, content in roles.items()}
    return {
        "config.json": _model_config(shape, ids, token_id(tokenizer, IMAGE), dtype),
        "generation_config.json": dict(ids),
        "preprocessor_config.json": _preprocessor_config(shape),
        "processor_config.json": {"image_seq_len": shape.image_seq_len, "processor_class": "Idefics3Processor"},
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
        "tokenizer_config.json": _tokenizer_config(shape),
    }


def _model_config(shape: Shape, ids: dict[str, int], image_token_id: int, dtype: str) -> dict[str, Any]:
    text = asdict(shape.text)
    theta = text.pop("rope_theta")
    return {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "model_type": "idefics3",
        "dtype": dtype,
        "image_token_id": image_token_id,
        "scale_factor": shape.scale_factor,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": shape.text.vocab_size,
        "text_config": {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            **ids,
            **text,
            "hidden_act": "silu",
            "mlp_bias": False,
            "rms_norm_eps": 1e-05,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "tie_word_embeddings": False,
        },
        "vision_config": {
            "model_type": "idefics3_vision",
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-06,
            "num_channels": 3,
            "attention_dropout": 0.0,
            **asdict(shape.vision),
        },
    }


def _preprocessor_config(shape: Shape) -> dict[str, Any]:
    steps = ("do_convert_rgb", "do_image_splitting", "do_normalize", "do_pad", "do_rescale", "do_resize")
    return {
        **dict.fromkeys(steps, True),
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_processor_type": "Idefics3ImageProcessor",
        "max_image_size": {"longest_edge": shape.vision.image_size},
        "processor_class": "Idefics3Processor",
        "resample": 1,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": shape.longest_edge},
    }


def _tokenizer_config(shape: Shape) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END_OF_UTTERANCE,
        "pad_token": PAD,
        "unk_token": "<|endoftext|>",
        "additional_special_tokens": [FAKE, IMAGE, END_OF_UTTERANCE],
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.text.max_position_embeddings,
        "padding_side": "left",
        "truncation_side": "left",
        "processor_class": "Idefics3Processor",
    }
