from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from word_pictures import WordPictures

from smolvlm.attention import packed_prefill
from smolvlm.model import SmolVLM
from smolvlm.training.batches import Batch, collate
from smolvlm.training.examples import NO_TARGET, ExampleMaker
from smolvlm.training.glyphs import BLANK
from smolvlm.training.objective import BLANK_WEIGHT, BatchedPrefill, Objective, loss_sizes, reading_loss
from smolvlm.training.plan import Losses


@pytest.fixture
def objective(fresh: Path) -> Objective:
    torch.manual_seed(0)
    module = Objective(SmolVLM.from_pretrained(fresh))
    module.requires_grad_(True)
    return module


def batch_of(make: ExampleMaker, *indices: int) -> Batch:
    return collate([make(WordPictures()(index)) for index in indices], make.config.image_token_id)


def logits_of_the_engine(model: SmolVLM, batch: Batch) -> Tensor:
    """Logits [L, V] of a single example by the path that serves."""
    tokens = batch.token_ids[0]
    features = model.encode_tiles(batch.pixels).flatten(0, 1)
    embeddings = model.embed(tokens, (batch.image_positions, features))
    logits: Tensor = model(embeddings, packed_prefill((len(tokens),), torch.device("cpu")))
    return logits


def test_batched_logits_are_those_of_the_engine_and_padding_changes_nothing(
    objective: Objective, make: ExampleMaker
) -> None:
    model, indices = objective.model, (0, 3, 8)
    batch = batch_of(make, *indices)
    count, length = batch.token_ids.shape
    attention = BatchedPrefill(count, torch.arange(length).repeat(count))
    features = model.encode_tiles(batch.pixels).flatten(0, 1)
    embeddings = model.embed(batch.token_ids.flatten(), (batch.image_positions, features))
    logits = model(embeddings, attention).unflatten(0, (count, length))
    for row, index in enumerate(indices):
        alone = logits_of_the_engine(model, batch_of(make, index))
        torch.testing.assert_close(logits[row, : len(alone)], alone, atol=1e-4, rtol=1e-4)


def test_the_text_loss_is_that_of_the_answers_tokens(objective: Objective, make: ExampleMaker) -> None:
    indices = (0, 3, 8)
    each = [batch_of(make, index) for index in indices]
    logits = torch.cat([logits_of_the_engine(objective.model, batch) for batch in each])
    labels = torch.cat([batch.labels[0] for batch in each])
    losses = objective(batch_of(make, *indices), Losses(1, 0, 0))
    assert set(losses) == {"text"}
    torch.testing.assert_close(losses["text"], F.cross_entropy(logits, labels, ignore_index=NO_TARGET))


def test_the_glyph_loss_counts_blanks_for_little(objective: Objective, make: ExampleMaker) -> None:
    batch = batch_of(make, 0, 3)
    losses = objective(batch, Losses(0, 1, 0))
    assert set(losses) == {"glyph"}
    logits = objective.glyph_head(objective.model.vision(batch.pixels)).reshape(batch.glyphs.numel(), -1)
    targets = batch.glyphs.flatten()
    each = F.cross_entropy(logits, targets, reduction="none")
    weight = torch.where(targets == BLANK, BLANK_WEIGHT, 1.0)
    torch.testing.assert_close(losses["glyph"], (each * weight).sum() / weight.sum())
    losses["glyph"].backward()
    assert all(parameter.grad is None for parameter in objective.model.text.parameters())


def test_the_reading_loss_is_that_of_the_first_head() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (4, 2))
    targets = torch.tensor([[NO_TARGET, 0, 2, NO_TARGET, 1], [NO_TARGET, NO_TARGET, 1, 3, 3]])
    expected = []
    for row, column in (targets != NO_TARGET).nonzero().tolist():
        scores = torch.stack([q[row, 0, column] @ k[row, 0, key] / 8**0.5 for key in range(column + 1)])
        expected.append(-scores.log_softmax(0)[targets[row, column]])
    torch.testing.assert_close(reading_loss(q, k, targets), torch.stack(expected).mean())


def test_the_reading_loss_reaches_attention_and_vision(objective: Objective, make: ExampleMaker) -> None:
    losses = objective(batch_of(make, 0, 3), Losses(0, 0, 1))
    losses["reading"].backward()
    reached = {name for name, parameter in objective.named_parameters() if parameter.grad is not None}
    assert {"model.vision.embedding.projection.weight", "model.text.layers.1.attention.qkv.weight"} <= reached


def test_sizes_are_what_the_losses_are_means_over(make: ExampleMaker) -> None:
    batch = batch_of(make, 0, 3)  # "cat" and "house": a space and an end token more each
    blank = batch.glyphs.numel() - len("cathouse")
    assert loss_sizes(batch) == {
        "text": len(" cat house") + 2,
        "glyph": pytest.approx(len("cathouse") + BLANK_WEIGHT * blank),
        "reading": len(" cat house"),
    }
