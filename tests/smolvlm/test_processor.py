"""The processor as a user calls it; prompts and tiles themselves are compared in test_prompt and test_image."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import smolvlm
from smolvlm.image import ImagePolicy, Tiles, split_image
from smolvlm.processor import Processor

QUESTION: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
]


@pytest.fixture(scope="module")
def processor(tiny_checkpoint: Path) -> Processor:
    return smolvlm.Processor.from_pretrained(tiny_checkpoint)


@pytest.mark.parametrize(
    "options",
    [{}, {"image_splitting": False}, {"longest_edge": 64}, {"upscale": False}, {"longest_edge": 64, "upscale": False}],
)
def test_options_are_the_image_policy(processor: Processor, options: dict[str, Any]) -> None:
    image = Image.effect_noise((90, 50), 80)
    prepared = processor(QUESTION, [image], **options)
    expected = split_image(image, processor.config.image, ImagePolicy(**options))
    np.testing.assert_array_equal(prepared.tiles[0].pixels, expected.pixels)
    num_image_tokens = prepared.prompt_token_ids.count(processor.config.image_token_id)
    assert num_image_tokens == len(expected.pixels) * processor.config.image_seq_len


def test_tiles_made_elsewhere_give_the_same_input(processor: Processor) -> None:
    images = [Image.effect_noise(size, 80) for size in ((90, 50), (20, 20))]
    messages: list[dict[str, Any]] = [*QUESTION, {"role": "assistant", "content": "A cat."}, *QUESTION]
    direct = processor(messages, images)
    tiles = [split_image(image, processor.config.image) for image in images]
    prepared = processor.from_tiles(messages, tiles)
    assert prepared.prompt_token_ids == direct.prompt_token_ids
    assert all(mine is given for mine, given in zip(prepared.tiles, tiles, strict=True))


def test_each_input_owns_its_tokens(processor: Processor) -> None:
    tiles = [split_image(Image.new("RGB", (20, 20)), processor.config.image)]
    first = processor.from_tiles(QUESTION, tiles)
    expected = list(first.prompt_token_ids)
    first.prompt_token_ids.append(-1)
    assert processor.from_tiles(QUESTION, tiles).prompt_token_ids == expected


def test_a_bucket_of_equal_prompts_costs_next_to_nothing(processor: Processor) -> None:
    tiles = [split_image(Image.new("RGB", (20, 20)), processor.config.image)]
    processor.from_tiles(QUESTION, tiles)
    rates = []
    for _ in range(5):
        start = time.thread_time()
        for _ in range(400):
            processor.from_tiles(QUESTION, tiles)
        rates.append(400 / (time.thread_time() - start))
    assert max(rates) > 20_000


def test_tiles_of_another_checkpoint_are_refused(processor: Processor) -> None:
    other = split_image(Image.new("RGB", (20, 20)), replace(processor.config.image, tile_size=16))
    with pytest.raises(ValueError, match=r"\(65, 16, 16, 3\); a grid of 8×8 needs \(65, 32, 32, 3\)"):
        processor.from_tiles(QUESTION, [other])
    with pytest.raises(ValueError, match="a grid of 2×2 needs"):
        processor.from_tiles(QUESTION, [Tiles(np.zeros((4, 32, 32, 3), np.uint8), rows=2, cols=2)])


def test_decoding_gives_the_text_without_special_tokens(processor: Processor) -> None:
    ids = processor.tokenizer.encode("<|im_start|>The car is blue. naïve 猫<end_of_utterance>").ids
    assert processor.decode(ids) == "The car is blue. naïve 猫"
    assert processor.decode([]) == ""


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path: Path, tiny_checkpoint: Path) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((tiny_checkpoint / name).read_bytes())
    with pytest.raises(ValueError, match=r"tokenizer\.json does not exist"):
        Processor.from_pretrained(tmp_path)
