"""Training examples: an image, its text and, where they are known, the places of the characters.

Every example follows from its index, so that a resumed run, or one with other workers, sees the same data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from tokenizers import Tokenizer

from smolvlm.config import END_OF_UTTERANCE, ModelConfig
from smolvlm.image import Tiles, split_image
from smolvlm.processor import Processor
from smolvlm.training.documents import DocumentGenerator
from smolvlm.training.glyphs import glyph_targets, image_token_of
from smolvlm.vocabulary import token_id

NO_TARGET = -100  # what torch's cross entropy leaves out
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Labelled:
    """An image and the text to answer; `boxes` float32 [len(text), 4] in pixels of the image (x0, y0, x1, y1), NaN for
    white space, None where nobody knows. `name` says in an error which one it is."""

    name: str
    image: Image.Image
    text: str
    boxes: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Example:
    """An example as the model takes it.

    token_ids and labels are int64 [L]: prompt and answer, and for each position the token that follows it, NO_TARGET in
    the prompt. `reading` int64 [L] is the position of the image token that shows the next character, else NO_TARGET.
    `glyphs` int64 [N, P, SLOTS] are the characters in each patch (smolvlm.training.glyphs).
    """

    tiles: Tiles
    token_ids: Int64
    labels: Int64
    reading: Int64
    glyphs: Int64


Draw = Callable[[int], Labelled]
"""The labelled image of an index; the same one for the same index in every process. It travels to data workers."""


@dataclass(frozen=True)
class DrawDocument:
    """The built-in documents as training data, with the places of all characters."""

    generator: DocumentGenerator

    def __call__(self, index: int) -> Labelled:
        document = self.generator.document(index)
        name = f"document {index} of seed {self.generator.seed} ({self.generator.split})"
        return Labelled(name, document.image, document.text, document.boxes)


class ExampleMaker:
    """Turns labelled images into examples for one checkpoint directory and one prompt."""

    def __init__(self, directory: Path, prompt: str) -> None:
        self._made_from = directory, prompt
        self.processor = Processor.from_pretrained(directory)
        self.config: ModelConfig = self.processor.config
        tokenizer = self.processor.tokenizer
        self._plain = Tokenizer.from_str(tokenizer.to_str())
        self._plain.encode_special_tokens = True
        self._end = token_id(tokenizer, END_OF_UTTERANCE)
        self._messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]

    def __reduce__(self) -> tuple[type[ExampleMaker], tuple[Path, str]]:
        """Data workers make their own: a tokenizer's caches do not travel."""
        return type(self), self._made_from

    def __call__(self, labelled: Labelled) -> Example:
        """Raises ValueError, naming the image, for an empty text or one that does not fit the model's context."""
        tiles = split_image(labelled.image, self.config.image)
        prompt = self.processor.from_tiles(self._messages, [tiles]).prompt_token_ids
        answer, starts = self._encode(labelled)
        token_ids = np.array(prompt + answer, np.int64)
        self._check(labelled, len(token_ids))
        labels = np.full(len(token_ids), NO_TARGET, np.int64)
        labels[len(prompt) - 1 : -1] = answer
        return Example(
            tiles, token_ids[:-1], labels[:-1], *self._places(labelled, tiles, token_ids[:-1], len(prompt), starts)
        )

    def _encode(self, labelled: Labelled) -> tuple[list[int], list[int]]:
        """The answer's tokens, the end token last, and the index in `text` where each of the others begins."""
        text = labelled.text.strip()
        if not text:
            raise ValueError(f"{labelled.name}: the text is empty; an example needs something to answer")
        skipped = labelled.text.index(text[0])
        encoded = self._plain.encode(f" {text}", add_special_tokens=False)
        return [*encoded.ids, self._end], [max(start - 1, 0) + skipped for start, _ in encoded.offsets]

    def _check(self, labelled: Labelled, num_tokens: int) -> None:
        if num_tokens > self.config.text.max_positions:
            raise ValueError(
                f"{labelled.name}: prompt and text have {num_tokens} tokens, the model's context holds "
                f"{self.config.text.max_positions}; shorten the text or leave the row out"
            )

    def _places(
        self, labelled: Labelled, tiles: Tiles, token_ids: Int64, num_prompt: int, starts: list[int]
    ) -> tuple[Int64, Int64]:
        reading = np.full(len(token_ids), NO_TARGET, np.int64)
        if labelled.boxes is None:
            return reading, np.empty((len(tiles.pixels), 0, 0), np.int64)
        image_positions = np.flatnonzero(token_ids == self.config.image_token_id)
        shown_at = image_token_of(labelled.boxes, labelled.image.size, tiles, self.config)  # [len(text)]
        known = np.append(shown_at[starts], -1)  # nothing shows the end token
        reading[num_prompt - 1 :] = np.where(known >= 0, image_positions[known], NO_TARGET)
        return reading, glyph_targets(labelled.text, labelled.boxes, labelled.image.size, tiles, self.config)
