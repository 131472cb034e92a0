"""Executes what the scheduler decided: turns sequences into tensors, runs the model, and gives back tokens.

Everything between two tokens stays on the device, and nothing is sent to a GPU in a way that waits for it: the host
waits for chosen tokens alone. On a GPU the encoder has a stream of its own, for which prefill waits on the device.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from smolvlm.attention import (
    KVCache,
    PackedPrefill,
    PagedDecode,
    PagedPrefill,
    can_pack_sequences,
    paged_decode,
)
from smolvlm.engine.chosen import Chosen as Chosen
from smolvlm.engine.chosen import read_tokens
from smolvlm.engine.cuda_graph import captured
from smolvlm.engine.images import TileSpan
from smolvlm.engine.sequence import Sequence
from smolvlm.engine.static_decode import StaticDecoder
from smolvlm.engine.static_encode import Encode
from smolvlm.engine.upload import send, upload_to
from smolvlm.engine.vision_stream import vision_stream
from smolvlm.model import SmolVLM
from smolvlm.sampling import SamplingTensors

if TYPE_CHECKING:
    from smolvlm.kernels.fused_model import FusedSmolVLM

DecodeMode = Literal["eager", "graph"]  # operators of torch one by one, or CUDA graphs around fused kernels
Part = tuple[Sequence, int, int]  # prompt[start:stop] of a sequence


@dataclass
class DecodeBatch:
    """What decoding the same sequences again needs; it moves on by one token a step and is rebuilt when they change."""

    ids: list[int]
    tokens: Tensor  # int64 [B], the last token of each sequence, whose keys and values are not yet stored
    positions: Tensor  # int64 [B], where these tokens stand
    block_table: Tensor  # int64 [B, N]
    sampling: SamplingTensors | None

    def attention(self, cache: KVCache, num_tokens: int) -> PagedDecode:
        """Write and read positions for a step in which the longest sequence has `num_tokens` tokens."""
        return paged_decode(self.positions, self.block_table[:, : -(-num_tokens // cache.block_size)], cache)


def default_decode(device: torch.device) -> DecodeMode:
    return "graph" if device.type == "cuda" else "eager"


class Runner:
    """Owns the model and its cache; knows nothing of queues. `decode` None is what suits the device."""

    def __init__(self, model: SmolVLM, cache: KVCache, device: torch.device, decode: DecodeMode | None = None) -> None:
        self.model: SmolVLM | FusedSmolVLM = model
        self.cache = cache
        self.device = device
        self.static: StaticDecoder | None = None
        self._encode: Encode = model.encode_tiles
        if (decode or default_decode(device)) == "graph":
            self.model, self._encode, self.static = captured(model, cache, device)
        self.vision = vision_stream(device)
        self._upload = upload_to(device)
        self._packs = can_pack_sequences(device, model.text.embedding.weight.dtype)
        self._batch: DecodeBatch | None = None

    @torch.inference_mode()
    def encode(self, spans: list[TileSpan]) -> None:
        """Encode the tiles of these spans in one batch and hand each image its part."""
        with self.vision.batch() if self.vision else nullcontext(0) as batch:
            features = self._encode(self._upload([span.pixels for span in spans]))  # [n, image_seq_len, H]
            for span, part in zip(spans, features.split([span.stop - span.start for span in spans]), strict=True):
                span.image.store(span.start, part, batch)

    @torch.inference_mode()
    def prefill(self, sequences: list[Sequence]) -> Chosen:
        """Run the scheduled parts of the prompts, packed; choose the first token of each whose prompt ends there."""
        parts = [(sequence, sequence.num_computed, sequence.num_scheduled) for sequence in sequences]
        tokens = np.concatenate([sequence.prompt_token_ids[start:stop] for sequence, start, stop in parts])
        attention = self._prefill_attention(parts)
        last = np.cumsum(attention.lengths) - 1
        logits = self.model(self._embed(tokens, parts), attention, self._send(last))
        ends = [row for row, (sequence, _, stop) in enumerate(parts) if stop == len(sequence.prompt_token_ids)]
        if not ends:
            return []
        complete = [sequences[row] for row in ends]
        if len(ends) < len(parts):
            logits = logits.index_select(0, self._send(np.array(ends)))
        return self._choose(logits, complete, self._sampling(complete))[1]

    @torch.inference_mode()
    def decode(self, sequences: list[Sequence]) -> Chosen:
        """Choose the next token of each sequence, or the next few (StaticDecoder)."""
        if self.static is not None:
            return self.static.decode(sequences)
        batch = self._batch
        if batch is None or batch.ids != [sequence.id for sequence in sequences]:
            batch = self._batch = self._decode_batch(sequences)
        attention = batch.attention(self.cache, max(sequence.num_tokens for sequence in sequences))
        logits = self.model(self.model.embed(batch.tokens), attention)
        batch.tokens, chosen = self._choose(logits, sequences, batch.sampling)
        batch.positions = batch.positions + 1
        return chosen

    def _prefill_attention(self, parts: list[Part]) -> PackedPrefill | PagedPrefill:
        lengths = tuple(stop - start for _, start, stop in parts)
        positions = self._send(np.concatenate([np.arange(start, stop) for _, start, stop in parts]))
        slots = self._send(np.concatenate([self._slots(*part) for part in parts]))
        if not any(start for _, start, _ in parts):
            return PackedPrefill(lengths, positions, slots, self.cache, self._starts(lengths))
        prefixes = tuple(self._prefix(*part) if part[1] else None for part in parts)
        return PagedPrefill(lengths, positions, slots, prefixes, self.cache)

    def _starts(self, lengths: tuple[int, ...]) -> Tensor | None:
        if not self._packs:
            return None
        return self._send(np.cumsum((0, *lengths), dtype=np.int32))

    def _prefix(self, sequence: Sequence, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Pages of prompt[:stop] and what prompt[start:stop] sees of them (PagedPrefill)."""
        pages = -(-stop // self.cache.block_size)
        table = self._send(np.array([sequence.block_table[:pages]]))
        keys = torch.arange(pages * self.cache.block_size, device=self.device)
        return table, keys <= torch.arange(start, stop, device=self.device).unsqueeze(1)

    def _embed(self, token_ids: np.ndarray, parts: list[Part]) -> Tensor:
        ids = self._send(token_ids)
        positions = np.flatnonzero(token_ids == self.model.config.image_token_id)
        if not len(positions):
            return self.model.embed(ids)
        self._receive([sequence for sequence, _, _ in parts])
        features = torch.cat([each for part in parts for each in self._features(*part)])
        return self.model.embed(ids, (self._send(positions), features))

    def _receive(self, sequences: list[Sequence]) -> None:
        if self.vision is not None:
            images = [image for sequence in sequences for image in sequence.images]
            features = [image.features for image in images if image.features is not None]
            self.vision.receive(max(sequence.last_batch for sequence in sequences), features)

    def _features(self, sequence: Sequence, start: int, stop: int) -> list[Tensor]:
        """Embeddings of the image tokens in prompt[start:stop].

        They are counted from the prompt's end: images before `start` may be gone, and their tiles not encoded. No
        others are read, since the encoder may be writing them.
        """
        if not sequence.images:
            return []
        embeddings = [image.embeddings for image in sequence.images]
        is_image = np.asarray(sequence.prompt_token_ids[start:]) == self.model.config.image_token_id
        first = sum(len(each) for each in embeddings) - int(is_image.sum())
        last = first + int(is_image[: stop - start].sum())
        parts = []
        for each in embeddings:
            parts.append(each[max(first, 0) : max(last, 0)])
            first, last = first - len(each), last - len(each)
        return parts

    def _slots(self, sequence: Sequence, start: int, stop: int) -> np.ndarray:
        """Cache slots of prompt[start:stop], int64."""
        positions, size = np.arange(start, stop), self.cache.block_size
        return np.asarray(sequence.block_table)[positions // size] * size + positions % size

    def _decode_batch(self, sequences: list[Sequence]) -> DecodeBatch:
        rows = max(len(sequence.block_table) for sequence in sequences)
        table = [sequence.block_table + [0] * (rows - len(sequence.block_table)) for sequence in sequences]
        return DecodeBatch(
            ids=[sequence.id for sequence in sequences],
            tokens=self._send(np.array([sequence.token_ids[-1] for sequence in sequences])),
            positions=self._send(np.array([sequence.num_tokens - 1 for sequence in sequences])),
            block_table=self._send(np.array(table)),
            sampling=self._sampling(sequences),
        )

    def _sampling(self, sequences: list[Sequence]) -> SamplingTensors | None:
        return SamplingTensors.of([sequence.params for sequence in sequences], self.device)

    def _choose(
        self, logits: Tensor, sequences: list[Sequence], sampling: SamplingTensors | None
    ) -> tuple[Tensor, Chosen]:
        uniform = None
        if sampling is not None:
            numbers = np.array([[sequence.random.random()] for sequence in sequences], dtype=np.float32)
            uniform = self._send(numbers)
        tokens, logprobs = self.model.choose(logits, sampling, uniform)
        chosen = torch.stack([tokens.float(), logprobs])
        return tokens, read_tokens(chosen, logits, sequences, range(len(sequences)))

    def _send(self, values: npt.NDArray[Any]) -> Tensor:
        return send(values, self.device)
