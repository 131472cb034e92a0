"""SmolVLM: vision encoder, connector and text decoder, as three steps that an engine can schedule on their own.

Source: transformers Idefics3ForConditionalGeneration (SmolVLMForConditionalGeneration is the same network).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from smolvlm.attention import Attention
from smolvlm.config import ModelConfig
from smolvlm.connector import Connector
from smolvlm.sampling import SamplingTensors, choose_tokens
from smolvlm.text import TextDecoder
from smolvlm.vision import VisionEncoder
from smolvlm.weights import load_weights


class SmolVLM(nn.Module):
    """The network alone: no tokenizer, no sampling, no state between calls other than the cache inside `attention`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config.vision, config.image)
        self.connector = Connector(config)
        self.text = TextDecoder(config.text)
        self.head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Make the head share the embedding's weight where the config says so."""
        if self.config.tie_word_embeddings:
            self.head.weight = self.text.embedding.weight

    @classmethod
    def from_pretrained(
        cls, path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> SmolVLM:
        """Build the network of a checkpoint directory and load its weights strictly, in `dtype`, for inference.

        Raises:
            ValueError: a checkpoint key is missing, unexpected or of another shape (smolvlm.weights.load_weights).
        """
        config = ModelConfig.from_pretrained(path)
        with torch.device("meta"):
            model = cls(config)
        model = model.to(dtype).to_empty(device=device)
        model.tie()
        model.vision.embedding.reset_buffers()
        model.text.reset_buffers()
        load_weights(model, path)
        return model.requires_grad_(False).eval()

    def encode_tiles(self, pixels: Tensor) -> Tensor:
        """uint8 tiles [N, S, S, 3] → image token embeddings [N, image_seq_len, H]."""
        embeddings: Tensor = self.connector(self.vision(pixels))
        return embeddings

    def embed(self, token_ids: Tensor, images: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Token ids [T] → embeddings [T, H]; images = (positions [M], image token embeddings [M, H]) replace theirs."""
        embeddings: Tensor = self.text.embedding(token_ids)
        if images is None:
            return embeddings
        positions, features = images
        return embeddings.index_copy(0, positions, features.to(embeddings.dtype))

    def forward(self, embeddings: Tensor, attention: Attention, last: Tensor | None = None) -> Tensor:
        """Embeddings [T, H] → logits [T, V]; `last` [n] keeps these positions only, before the head: [n, V].

        Prefill needs the logits of last positions alone; all of them would cost a quarter of its time at 256M.
        """
        hidden = self.text(embeddings, attention)
        logits: Tensor = self.head(hidden if last is None else hidden.index_select(0, last))
        return logits

    def choose(self, logits: Tensor, sampling: SamplingTensors | None, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits [B, V] → the next tokens int64 [B] and their log-probabilities float32 [B] (choose_tokens)."""
        return choose_tokens(logits, sampling, uniform)
