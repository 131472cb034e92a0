"""Fresh checkpoints: seeded, quiet weights in the published format, and the encoder of another one where asked."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smolvlm.model import SmolVLM
from smolvlm.processor import Processor
from smolvlm.scratch import Shape, TextShape, VisionShape
from smolvlm.training.fresh import NUM_TOKENS, create_fresh_checkpoint, fresh_weights, grid_positions

VISION = VisionShape(32, 64, 2, 2, 32, 8)
SHAPE = Shape(VISION, TextShape(48, 64, 2, 4, 2, 16, 256, 1e4, NUM_TOKENS), 2, 64)


def test_the_same_seed_gives_the_same_checkpoint(tmp_path: Path) -> None:
    files = [create_fresh_checkpoint(tmp_path / name, SHAPE, seed=3) / "model.safetensors" for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()
    other = create_fresh_checkpoint(tmp_path / "c", SHAPE, seed=4) / "model.safetensors"
    assert other.read_bytes() != files[0].read_bytes()


def test_it_loads_and_keeps_any_text(tmp_path: Path) -> None:
    directory = create_fresh_checkpoint(tmp_path, SHAPE, seed=0)
    assert SmolVLM.from_pretrained(directory).config.text.vocab_size == NUM_TOKENS
    processor = Processor.from_pretrained(directory)
    text = "Crème brûlée\n\n12,50 € <image>"
    assert processor.decode(processor.tokenizer.encode(text.replace("<image>", "<i>")).ids) == text.replace(
        "<image>", "<i>"
    )


def test_plain_paper_leaves_no_trace_in_a_fresh_patch_embedding() -> None:
    filters = fresh_weights(SHAPE, seed=0)["model.vision_model.embeddings.patch_embedding.weight"]
    assert torch.allclose(filters.sum(dim=(1, 2, 3)), torch.zeros(32), atol=1e-4)


def test_positions_tell_neighbours_from_strangers() -> None:
    positions = grid_positions(256, 192)
    similar = positions @ positions.T
    here = 5 * 16 + 5
    assert similar[here].argmax() == here
    assert similar[here, here + 1] > similar[here, here + 4] > similar[here, here + 9]
    assert similar[here, here + 16] > similar[here, here + 64]


def test_a_trained_encoder_gets_a_new_decoder(tmp_path: Path) -> None:
    trained = load_file(create_fresh_checkpoint(tmp_path / "old", SHAPE, seed=1) / "model.safetensors")
    shape = replace(SHAPE, text=replace(SHAPE.text, num_hidden_layers=3, head_dim=32))
    made = load_file(create_fresh_checkpoint(tmp_path / "new", shape, 2, tmp_path / "old") / "model.safetensors")
    fresh = load_file(create_fresh_checkpoint(tmp_path / "fresh", shape, 2) / "model.safetensors")
    for key, tensor in made.items():
        source = trained if key.startswith("model.vision_model.") else fresh
        assert torch.equal(tensor, source[key]), key
    assert not torch.equal(trained["model.vision_model.embeddings.patch_embedding.weight"],
                           fresh["model.vision_model.embeddings.patch_embedding.weight"])  # fmt: skip


def test_another_vocabulary_is_refused_by_name(tmp_path: Path) -> None:
    shape = replace(SHAPE, text=replace(SHAPE.text, vocab_size=500))
    with pytest.raises(ValueError, match=r"start\.shape\.text\.vocab_size is 500"):
        create_fresh_checkpoint(tmp_path / "new", shape, 0)
