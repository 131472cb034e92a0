"""The losses: next token, and two that teach reading densely where the places of the characters are known."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smolvlm.dense_attention import dense_attention, later_keys
from smolvlm.model import SmolVLM
from smolvlm.training.batches import Batch
from smolvlm.training.examples import NO_TARGET
from smolvlm.training.glyphs import BLANK, NUM_CLASSES, SLOTS
from smolvlm.training.plan import Losses

BLANK_WEIGHT = 0.1  # most patches hold nothing


@dataclass
class BatchedPrefill:
    """Attention of B padded sequences of L tokens, each causally to itself; keeps queries and keys of some layers."""

    num_sequences: int
    positions: Tensor  # int64 [B * L]
    watched: frozenset[int] = frozenset()
    seen: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # layer → q [B, heads, L, D], k [B, kv, L, D]

    def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        q, k, v = (heads.unflatten(0, (self.num_sequences, -1)).transpose(1, 2) for heads in (q, *kv.unbind(1)))
        if layer in self.watched:
            self.seen[layer] = (q, k)
        return dense_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(0, 1)


class Objective(nn.Module):
    """Batch → {"text", "glyph", "reading"}: each a mean loss of the batch; those of weight 0 are left out."""

    def __init__(self, model: SmolVLM) -> None:
        super().__init__()
        self.model = model
        self.glyph_head = nn.Linear(model.config.vision.hidden_size, SLOTS * NUM_CLASSES)
        self.reading_layers = reading_layers(model.config.text.num_layers)

    def forward(self, batch: Batch, weights: Losses) -> dict[str, Tensor]:
        patches = self.model.vision(batch.pixels)  # [N, P, H]
        losses: dict[str, Tensor] = {}
        if weights.glyph:
            losses["glyph"] = self._glyph_loss(patches, batch.glyphs)
        if weights.text or weights.reading:
            losses |= self._text_losses(self.model.connector(patches), batch, weights)
        return losses

    def _glyph_loss(self, patches: Tensor, targets: Tensor) -> Tensor:
        logits = self.glyph_head(patches).unflatten(-1, (SLOTS, NUM_CLASSES)).flatten(0, 2)
        weight = torch.ones(NUM_CLASSES, device=logits.device)
        weight[BLANK] = BLANK_WEIGHT
        return F.cross_entropy(logits.float(), targets.flatten(), weight)

    def _text_losses(self, features: Tensor, batch: Batch, weights: Losses) -> dict[str, Tensor]:
        num_sequences, length = batch.token_ids.shape
        positions = torch.arange(length, device=features.device).repeat(num_sequences)
        watched = frozenset(self.reading_layers if weights.reading else ())
        attention = BatchedPrefill(num_sequences, positions, watched)
        embeddings = self.model.embed(batch.token_ids.flatten(), (batch.image_positions, features.flatten(0, 1)))
        hidden = self.model.text(embeddings, attention)
        labels = batch.labels.flatten()
        kept = (labels != NO_TARGET).nonzero().squeeze(1)
        logits = self.model.head(hidden.index_select(0, kept))
        losses = {"text": F.cross_entropy(logits.float(), labels.index_select(0, kept))}
        if weights.reading:
            parts = [reading_loss(*attention.seen[layer], batch.reading) for layer in self.reading_layers]
            losses["reading"] = torch.stack(parts).mean()
        return losses


def loss_sizes(batch: Batch) -> dict[str, float]:
    """What each loss of a batch is a mean over: answer tokens, weighted glyph slots, answer tokens with a place.

    Micro-batches and processes count by it, so that how a step's examples are cut does not matter.
    """
    blank = int((batch.glyphs == BLANK).sum())
    return {
        "text": int((batch.labels != NO_TARGET).sum()),
        "glyph": batch.glyphs.numel() - blank + BLANK_WEIGHT * blank,
        "reading": int((batch.reading != NO_TARGET).sum()),
    }


def reading_layers(num_layers: int) -> tuple[int, ...]:
    """The decoder layers whose first head is taught where to look: after one that gathers the last characters."""
    return (1, 2) if num_layers > 2 else (num_layers - 1,)


def reading_loss(q: Tensor, k: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of the first head's attention: q [B, heads, L, D], k [B, kv_heads, L, D], targets int64 [B, L]."""
    first = int((targets != NO_TARGET).any(0).int().argmax())  # answers stand behind the image tokens
    scores = (q[:, 0, first:].float() / q.shape[-1] ** 0.5) @ k[:, 0].float().transpose(1, 2)  # [B, L - first, L]
    scores = scores.masked_fill(later_keys(targets.shape[1], scores.device)[first:], -torch.inf)
    return F.cross_entropy(scores.flatten(0, 1), targets[:, first:].flatten(), ignore_index=NO_TARGET)
