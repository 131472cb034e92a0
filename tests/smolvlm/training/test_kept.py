"""Parts of a trained model inside a new one: deeper, finer, or as they were."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smolvlm.engine import Engine
from smolvlm.model import SmolVLM
from smolvlm.processor import Processor
from smolvlm.sampling import SamplingParams
from smolvlm.scratch import Shape, TextShape, VisionShape, create_checkpoint
from smolvlm.training.fresh import NUM_TOKENS, create_fresh_checkpoint, grid_positions
from smolvlm.training.kept import stretched_positions
from smolvlm.training.plan import Part

VISION = VisionShape(32, 64, 2, 2, 32, 8)
SHAPE = Shape(VISION, TextShape(48, 64, 2, 4, 2, 16, 256, 1e4, NUM_TOKENS), 2, 64)
ALL: tuple[Part, ...] = ("vision", "connector", "text")


def answer(directory: Path) -> list[int]:
    processor = Processor.from_pretrained(directory)
    inputs = processor([{"role": "user", "content": [{"type": "text", "text": "Read."}]}], [])
    return Engine.from_pretrained(directory).generate([inputs], SamplingParams(max_new_tokens=8))[0].token_ids


def test_added_layers_change_nothing_before_they_are_trained(tmp_path: Path) -> None:
    old = create_fresh_checkpoint(tmp_path / "old", SHAPE, seed=1)
    deeper = replace(SHAPE, vision=replace(VISION, num_hidden_layers=4), text=replace(SHAPE.text, num_hidden_layers=3))
    new = create_fresh_checkpoint(tmp_path / "new", deeper, 2, old, ALL)
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    ours, theirs = (SmolVLM.from_pretrained(directory) for directory in (new, old))
    with torch.inference_mode():
        assert torch.equal(ours.encode_tiles(pixels), theirs.encode_tiles(pixels))
    assert answer(new) == answer(old)


def test_positions_of_a_finer_grid_lie_between_those_of_the_coarser() -> None:
    stretched = stretched_positions(grid_positions(64, 32), 256)
    assert stretched.shape == (256, 32)
    wanted = torch.nn.functional.interpolate(
        grid_positions(64, 32).T.reshape(1, 32, 8, 8), size=(16, 16), mode="bicubic", align_corners=False
    )
    assert torch.equal(stretched, wanted[0].flatten(1).T)
    # The patch that covers the same place is the most similar one.
    similar = stretched @ grid_positions(64, 32).T
    places = [divmod(int(index), 8) for index in similar.argmax(1)]
    expected = [(row // 2, col // 2) for row in range(16) for col in range(16)]
    near = [abs(a - c) <= 1 and abs(b - d) <= 1 for (a, b), (c, d) in zip(places, expected, strict=True)]
    assert all(near)


def test_larger_tiles_take_over_everything_but_the_positions(tmp_path: Path) -> None:
    old = create_fresh_checkpoint(tmp_path / "old", SHAPE, seed=1)
    larger = replace(SHAPE, vision=replace(VISION, image_size=64))
    made = load_file(create_fresh_checkpoint(tmp_path / "new", larger, 2, old, ALL) / "model.safetensors")
    trained = load_file(old / "model.safetensors")
    differing = {key for key in made if not torch.equal(made[key], trained[key])}
    assert differing == {"model.vision_model.embeddings.position_embedding.weight"}


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        (replace(SHAPE, vision=replace(VISION, hidden_size=64)), "model.connector"),
        (replace(SHAPE, vision=replace(VISION, num_hidden_layers=1)), r"layers\.1\."),
        (replace(SHAPE, scale_factor=4), "model.connector"),
        (replace(SHAPE, text=replace(SHAPE.text, head_dim=32)), r"model\.text_model\.layers\.0"),
    ],
)
def test_a_part_that_does_not_fit_is_refused_by_name(tmp_path: Path, shape: Shape, named: str) -> None:
    create_fresh_checkpoint(tmp_path / "old", SHAPE, seed=1)
    with pytest.raises(ValueError, match=named):
        create_fresh_checkpoint(tmp_path / "new", shape, 2, tmp_path / "old", ALL)
    assert not (tmp_path / "new").exists()


def test_a_decoder_of_another_tokenizer_is_not_kept(tmp_path: Path) -> None:
    old = create_checkpoint(tmp_path / "old")
    with pytest.raises(ValueError, match=r"leave text out of start\.keep"):
        create_fresh_checkpoint(tmp_path / "new", SHAPE, 2, old, ALL)
