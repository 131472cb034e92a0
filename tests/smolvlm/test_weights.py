import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from smolvlm.model import SmolVLM
from smolvlm.weights import published_views, save_weights

QUERY = "model.text_model.layers.1.self_attn.q_proj.weight"
HEAD = "lm_head.weight"
EMBEDDING = "model.text_model.embed_tokens.weight"


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """Return a copy that a test may spoil."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def _weights(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / "model.safetensors")


def _write(checkpoint: Path, weights: dict[str, Tensor]) -> None:
    save_file(weights, checkpoint / "model.safetensors")


def _tie(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["tie_word_embeddings"] = True
    (checkpoint / "config.json").write_text(json.dumps(config))


def test_every_published_tensor_is_in_the_model(checkpoint: Path) -> None:
    weights = _weights(checkpoint)
    views = published_views(SmolVLM.from_pretrained(checkpoint))
    assert views.keys() == weights.keys()
    assert all(torch.equal(views[key], weights[key]) for key in weights)


def test_a_sharded_checkpoint_loads_the_same(checkpoint: Path) -> None:
    weights = _weights(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in shards.items():
        save_file({key: weights[key] for key in keys}, checkpoint / file)
    index = {"weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    views = published_views(SmolVLM.from_pretrained(checkpoint))
    assert all(torch.equal(views[key], weights[key]) for key in weights)
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors is named by"):
        SmolVLM.from_pretrained(checkpoint)


def test_weights_are_converted_to_the_asked_dtype(checkpoint: Path) -> None:
    views = published_views(SmolVLM.from_pretrained(checkpoint, dtype=torch.bfloat16))
    assert torch.equal(views[QUERY], _weights(checkpoint)[QUERY].bfloat16())


def test_saved_weights_load_again(checkpoint: Path) -> None:
    before = _weights(checkpoint)
    model = SmolVLM.from_pretrained(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    save_weights(model, checkpoint)
    after = _weights(checkpoint)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("key", [QUERY, HEAD, "model.vision_model.embeddings.patch_embedding.weight"])
def test_a_missing_key_is_named(checkpoint: Path, key: str) -> None:
    weights = _weights(checkpoint)
    del weights[key]
    _write(checkpoint, weights)
    with pytest.raises(ValueError, match=f"1 of .* weights are missing, first '{key}'"):
        SmolVLM.from_pretrained(checkpoint)


def test_an_unexpected_key_is_named(checkpoint: Path) -> None:
    _write(checkpoint, _weights(checkpoint) | {"model.text_model.layers.99.mlp.up_proj.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"unexpected key 'model\.text_model\.layers\.99\.mlp\.up_proj\.weight'"):
        SmolVLM.from_pretrained(checkpoint)


def test_a_wrong_shape_is_named(checkpoint: Path) -> None:
    weights = _weights(checkpoint)
    shape = list(weights[QUERY].shape)
    _write(checkpoint, weights | {QUERY: weights[QUERY][:-1].contiguous()})
    with pytest.raises(ValueError, match=r"q_proj\.weight' has shape") as raised:
        SmolVLM.from_pretrained(checkpoint)
    assert str(shape) in str(raised.value)


def test_no_weights_at_all(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor"):
        SmolVLM.from_pretrained(checkpoint)


def test_a_tied_head_may_be_absent_and_is_the_embedding(checkpoint: Path) -> None:
    _tie(checkpoint)
    weights = _weights(checkpoint)
    del weights[HEAD]
    _write(checkpoint, weights)
    model = SmolVLM.from_pretrained(checkpoint)
    assert model.head.weight is model.text.embedding.weight
    assert torch.equal(model.head.weight, weights[EMBEDDING])
    assert HEAD not in published_views(model)


def test_a_tied_head_that_is_there_must_equal_the_embedding(checkpoint: Path) -> None:
    _tie(checkpoint)
    weights = _weights(checkpoint)
    _write(checkpoint, weights | {HEAD: weights[EMBEDDING].clone()})
    assert torch.equal(SmolVLM.from_pretrained(checkpoint).head.weight, weights[EMBEDDING])
    _write(checkpoint, weights)
    with pytest.raises(ValueError, match="but the two differ; set tie_word_embeddings to false"):
        SmolVLM.from_pretrained(checkpoint)
