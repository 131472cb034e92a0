"""Our model and engine against transformers' Idefics3ForConditionalGeneration, fp32, on seeded random weights.

The tiny checkpoint always runs. The published shapes need the published configs and tokenizer beside this checkout.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Idefics3ForConditionalGeneration

from smolvlm import Engine, Processor, SamplingParams
from smolvlm.attention import packed_prefill
from smolvlm.image import Tiles
from smolvlm.model import SmolVLM
from smolvlm.processor import ModelInput
from smolvlm.scratch import create_checkpoint

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "smolvlm"
NUM_TOKENS = 64
GREEDY = SamplingParams(max_new_tokens=NUM_TOKENS, ignore_eos=True)


@dataclass(frozen=True)
class Case:
    """A checkpoint to compare on: layer counts None are the published ones; grids of the images of each input.

    Features and answers are compared of the last `compared` inputs, of the others only logits: the suite stays short.
    """

    size: str
    config: str | None
    text_layers: int | None
    vision_layers: int | None
    inputs: tuple[tuple[tuple[int, int], ...], ...]
    compared: int


NONE: tuple[tuple[int, int], ...] = ()
CASES = [
    Case("tiny", None, None, None, (NONE, ((0, 0),), ((2, 3),), ((0, 0), (1, 2), (0, 0))), compared=4),
    Case("256m", "256m", None, None, (NONE, ((0, 0),)), compared=1),
    Case("500m", "500m", 2, 1, (NONE, ((0, 0),), ((0, 0), (0, 0))), compared=1),
    Case("2.2b", "2.2b-v2", 1, 1, (NONE, ((0, 0),), ((0, 0), (0, 0))), compared=1),
]


@dataclass(frozen=True)
class Pair:
    """The two implementations on one checkpoint, and the inputs of its case."""

    engine: Engine
    reference: Any
    inputs: list[ModelInput]
    num_compared: int
    encoded: dict[int, Tensor] = field(default_factory=dict)

    @property
    def compared(self) -> list[ModelInput]:
        return self.inputs[-self.num_compared :]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.size)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    case: Case = request.param
    directory = tmp_path_factory.mktemp(case.size)
    _make_checkpoint(case, directory)
    reference: Any = Idefics3ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    reference.eval()
    reference.generation_config.eos_token_id = None
    engine = Engine.from_pretrained(directory, tile_batch=2)
    (directory / "model.safetensors").unlink()  # a gigabyte per case
    processor = Processor.from_pretrained(directory)
    inputs = [_input(processor, grids, seed) for seed, grids in enumerate(case.inputs)]
    return Pair(engine, reference, inputs, case.compared)


def _make_checkpoint(case: Case, directory: Path) -> None:
    if case.config is None:
        create_checkpoint(directory, case.size)
        return
    published = PUBLISHED / case.config
    if not published.is_dir():
        pytest.skip(f"the published config of {case.config} is not beside this checkout")
    create_checkpoint(
        directory,
        case.size,
        num_text_layers=case.text_layers,
        num_vision_layers=case.vision_layers,
        tokenizer_file=PUBLISHED / "tokenizer.json",
        dtype="bfloat16",  # on disk; both compute in float32
    )
    config = json.loads((published / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = case.text_layers or config["text_config"]["num_hidden_layers"]
    config["vision_config"]["num_hidden_layers"] = case.vision_layers or config["vision_config"]["num_hidden_layers"]
    (directory / "config.json").write_text(json.dumps(config))
    shutil.copy(published / "preprocessor_config.json", directory)


def _input(processor: Processor, grids: tuple[tuple[int, int], ...], seed: int) -> ModelInput:
    rng = np.random.default_rng(seed)
    side = processor.config.image.tile_size
    tiles = [Tiles(rng.integers(0, 256, (r * c + 1, side, side, 3), dtype=np.uint8), r, c) for r, c in grids]
    content = [{"type": "image"} for _ in grids] + [{"type": "text", "text": f"What is this, number {seed}?"}]
    return processor.from_tiles([{"role": "user", "content": content}], tiles)


def _pixels(model_input: ModelInput) -> Tensor:
    """uint8 [N, S, S, 3] of all images, tile after tile."""
    return torch.from_numpy(np.concatenate([tiles.pixels for tiles in model_input.tiles]))


def _arguments(model_input: ModelInput) -> dict[str, Tensor]:
    """What transformers takes: ids [1, L] and normalised pixels [1, N, 3, S, S]."""
    ids = torch.tensor([model_input.prompt_token_ids])
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model_input.tiles:
        arguments["pixel_values"] = ((_pixels(model_input).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5).unsqueeze(0)
    return arguments


def _assert_close(ours: Tensor, reference: Tensor) -> None:
    assert ours.shape == reference.shape
    assert ((ours - reference).abs().max() / reference.abs().max()).item() < 1e-4


def _features(pair: Pair, model_input: ModelInput) -> Tensor:
    """Our image token embeddings [N, image_seq_len, H], computed once: this is what the tests spend their time on."""
    if id(model_input) not in pair.encoded:
        with torch.inference_mode():
            pair.encoded[id(model_input)] = pair.engine.runner.model.encode_tiles(_pixels(model_input))
    return pair.encoded[id(model_input)]


def _logits(pair: Pair, model_input: ModelInput, answer: list[int], keep: int) -> Tensor:
    """Our logits [keep, V] at the end of prompt and answer, everything computed at once without a cache."""
    model = pair.engine.runner.model
    ids = torch.tensor(model_input.prompt_token_ids + answer)
    with torch.inference_mode():
        images = None
        if model_input.tiles:
            features = _features(pair, model_input).flatten(0, 1)
            images = ((ids == model.config.image_token_id).nonzero().squeeze(1)[: len(features)], features)
        attention = packed_prefill((len(ids),), ids.device)
        logits: Tensor = model(model.embed(ids, images), attention, torch.arange(len(ids) - keep, len(ids)))
    return logits


def test_encoder_and_connector_equal_the_reference(pair: Pair) -> None:
    model, reference = pair.engine.runner.model, pair.reference.model
    assert isinstance(model, SmolVLM)
    positions: list[Tensor] = []
    embedding = reference.vision_model.embeddings.position_embedding
    hook = embedding.register_forward_pre_hook(lambda _, arguments: positions.append(arguments[0]))
    for model_input in pair.compared:
        if not model_input.tiles:
            continue
        with torch.inference_mode():
            patches = reference.vision_model(pixel_values=_arguments(model_input)["pixel_values"][0]).last_hidden_state
            _assert_close(model.vision(_pixels(model_input)), patches)
            _assert_close(_features(pair, model_input), reference.connector(patches))
    hook.remove()
    for ids in positions:  # some releases of transformers were one too low here, which would be no reference
        assert torch.equal(ids, torch.arange(model.config.vision.num_patches).expand_as(ids))


def test_logits_equal_the_reference(pair: Pair) -> None:
    for model_input in pair.inputs:
        keep = min(len(model_input.prompt_token_ids), 64)
        with torch.inference_mode():
            reference = pair.reference(**_arguments(model_input), logits_to_keep=keep).logits[0]
        _assert_close(_logits(pair, model_input, [], keep), reference)


def test_greedy_tokens_of_a_batch_equal_those_of_the_reference_alone(pair: Pair) -> None:
    together = pair.engine.generate(pair.inputs, GREEDY)[-pair.num_compared :]
    for model_input, done in zip(pair.compared, together, strict=True):
        with torch.inference_mode():
            generated = pair.reference.generate(
                **_arguments(model_input), max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0
            )
        assert done.token_ids == generated[0, len(model_input.prompt_token_ids) :].tolist()
        recomputed = _logits(pair, model_input, done.token_ids[:-1], NUM_TOKENS).argmax(-1)
        assert done.token_ids == recomputed.tolist()
