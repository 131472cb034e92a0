from pathlib import Path

import pytest
import torch

from smolvlm.attention import packed_prefill
from smolvlm.model import SmolVLM


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> SmolVLM:
    return SmolVLM.from_pretrained(tiny_checkpoint)


def test_image_embeddings_take_the_place_of_image_tokens(model: SmolVLM) -> None:
    image_id = model.config.image_token_id
    ids = torch.tensor([5, image_id, 6, image_id])
    features = torch.randn(2, model.config.text.hidden_size)
    embedded = model.embed(ids, (torch.tensor([1, 3]), features))
    assert torch.equal(embedded[[1, 3]], features)
    assert torch.equal(embedded[[0, 2]], model.embed(torch.tensor([5, 6])))


def test_a_tile_makes_image_seq_len_embeddings(model: SmolVLM) -> None:
    side = model.config.vision.image_size
    tiles = torch.zeros(3, side, side, 3, dtype=torch.uint8)
    assert model.encode_tiles(tiles).shape == (3, model.config.image_seq_len, model.config.text.hidden_size)


def test_last_keeps_these_positions_only(model: SmolVLM) -> None:
    embeddings = model.embed(torch.tensor([1, 2, 3, 4, 5]))
    attention = packed_prefill((2, 3), embeddings.device)
    some = model(embeddings, attention, torch.tensor([1, 4]))
    torch.testing.assert_close(some, model(embeddings, attention)[[1, 4]])


def test_a_loaded_model_is_for_inference(model: SmolVLM) -> None:
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_low_precision_stays_near_float32(model: SmolVLM, tiny_checkpoint: Path) -> None:
    low = SmolVLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in low.parameters()} == {torch.bfloat16}
    side = model.config.vision.image_size
    tiles = torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    exact, rounded = model.encode_tiles(tiles), low.encode_tiles(tiles).float()
    assert ((rounded - exact).norm() / exact.norm()).item() < 0.03
