"""The one door to the model: chat messages and images in, prompt tokens and tiles out; token ids back to text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import Tokenizer

from smolvlm.config import ModelConfig
from smolvlm.hub import resolve_checkpoint
from smolvlm.image import ImagePolicy, Tiles, split_image
from smolvlm.prompt import Grid, PromptEncoder, Turn, parse_messages

CACHED_PROMPTS = 1024

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ModelInput:
    """What the engine takes: prompt_token_ids [L] and tiles per image. count(<image>) == sum(N) * image_seq_len."""

    prompt_token_ids: list[int]
    tiles: list[Tiles]


class Processor:
    """Prepares inputs for one checkpoint and turns its answers into text. Safe to share between threads."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        self.config = config
        self.tokenizer = tokenizer
        encoder = PromptEncoder(tokenizer, config.image_seq_len)

        # Prompts of a job are few and grids are a handful, while images are millions.
        @lru_cache(maxsize=CACHED_PROMPTS)
        def encode(turns: tuple[Turn, ...], grids: tuple[Grid, ...]) -> tuple[int, ...]:
            return tuple(encoder.encode(turns, grids))

        self._encode = encode

    @classmethod
    def from_pretrained(cls, path: str | Path, revision: str | None = None) -> "Processor":
        """Load config and tokenizer of a checkpoint directory or hub id. Raises ValueError where a file is missing."""
        directory = resolve_checkpoint(str(path), revision)
        config, file = ModelConfig.from_pretrained(directory), directory / "tokenizer.json"
        if not file.exists():
            raise ValueError(f"{file} does not exist; a checkpoint needs its tokenizer.json")
        return cls(config, Tokenizer.from_file(str(file)))

    def __call__(
        self,
        messages: Messages,
        images: Sequence[Image.Image] = (),
        image_splitting: bool | None = None,
        longest_edge: int | None = None,
        upscale: bool = True,
    ) -> ModelInput:
        """Prepare one conversation; `images` fill its entries of type 'image' in order.

        None means the checkpoint's own policy. EXIF orientation is not applied to PIL images (decode_image does it for
        files). Raises ValueError for malformed messages or a wrong number of images.
        """
        policy = ImagePolicy(longest_edge=longest_edge, upscale=upscale, image_splitting=image_splitting)
        return self.from_tiles(messages, [split_image(image, self.config.image, policy) for image in images])

    def from_tiles(self, messages: Messages, tiles: Sequence[Tiles]) -> ModelInput:
        """The same for images that were split elsewhere. Prompt tokens are cached by messages and grids."""
        for image in tiles:
            self._check(image)
        grids = tuple((image.rows, image.cols) for image in tiles)
        return ModelInput(list(self._encode(parse_messages(messages), grids)), list(tiles))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Give the text of generated tokens without special tokens. An answer begins with a space, as generated."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def _check(self, image: Tiles) -> None:
        side = self.config.image.tile_size
        expected = (image.rows * image.cols + 1, side, side, 3)
        if image.pixels.shape != expected:
            raise ValueError(
                f"tiles have the shape {image.pixels.shape}; a grid of {image.rows}×{image.cols} needs {expected}; "
                "split the image with this checkpoint's ImageConfig"
            )
