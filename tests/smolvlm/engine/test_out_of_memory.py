"""A device that runs out of memory: half as much at once, the same answers."""

import logging
from typing import Any

import pytest
import torch
from fixture_types import MakeEngine, MakeInput, MakeTiles

from smolvlm import Engine, SamplingParams
from smolvlm.engine.images import TileSpan
from smolvlm.engine.runner import Chosen, Runner
from smolvlm.engine.sequence import ONLINE, Sequence
from smolvlm.model import SmolVLM
from smolvlm.processor import ModelInput

GREEDY = SamplingParams(max_new_tokens=8, ignore_eos=True)


class SmallDevice(Runner):
    """Has memory for so many tiles or prompt tokens at once, and fails where the real one would: in the model."""

    max_tiles: int
    max_tokens: int

    def encode(self, spans: list[TileSpan]) -> None:
        self._take(sum(span.stop - span.start for span in spans), self.max_tiles)
        super().encode(spans)

    def prefill(self, sequences: list[Sequence]) -> Chosen:
        self._take(sum(each.num_scheduled - each.num_computed for each in sequences), self.max_tokens)
        return super().prefill(sequences)

    def _take(self, asked: int, room: int) -> None:
        if asked > room:
            raise torch.OutOfMemoryError(f"{asked} of {room}")


def _small(engine: Engine, max_tiles: int = 10**9, max_tokens: int = 10**9) -> Engine:
    assert isinstance(engine.runner.model, SmolVLM)
    runner = SmallDevice(engine.runner.model, engine.runner.cache, engine.runner.device)
    runner.max_tiles, runner.max_tokens = max_tiles, max_tokens
    engine.runner = runner
    return engine


@pytest.fixture(scope="module")
def inputs(make_input: MakeInput, make_tiles: MakeTiles) -> list[ModelInput]:
    shared = make_tiles(2, 3, seed=1)
    return [
        make_input(shared),
        make_input(shared, make_tiles(2, 2, seed=2), text="Compare."),
        make_input(make_tiles(3, 3, seed=3), text="Read all of it."),
        make_input(text="Once upon a time there was a small model that read pages."),
    ]


def _answers(engine: Engine, inputs: list[ModelInput], **options: Any) -> list[list[int]]:
    sequences = [engine.add(each, GREEDY, **options) for each in inputs]
    while engine.has_unfinished:
        engine.step()
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks
    assert len(engine.scheduler.images) == 0
    return [sequence.token_ids for sequence in sequences]


@pytest.mark.parametrize("priority", [0, ONLINE])
@pytest.mark.parametrize(("tiles", "limit"), [(5, 4), (1, 1), (64, 16)])
def test_the_encoder_goes_on_with_half_the_tiles(
    make_engine: MakeEngine, inputs: list[ModelInput], tiles: int, limit: int, priority: int
) -> None:
    expected = _answers(make_engine(), inputs)
    engine = _small(make_engine(tile_batch=16), max_tiles=tiles)
    assert _answers(engine, inputs, priority=priority) == expected
    assert engine.scheduler.limits.tile_batch == limit


@pytest.mark.parametrize("priority", [0, ONLINE])
@pytest.mark.parametrize("tokens", [40, 7, 1])
def test_prefill_goes_on_with_half_the_tokens_and_cuts_prompts_if_it_must(
    make_engine: MakeEngine, inputs: list[ModelInput], tokens: int, priority: int
) -> None:
    assert min(len(each.prompt_token_ids) for each in inputs) > 7
    expected = _answers(make_engine(), inputs)
    engine = _small(make_engine(), max_tokens=tokens)
    assert _answers(engine, inputs, priority=priority) == expected
    assert tokens // 2 <= engine.scheduler.limits.max_num_tokens <= tokens


def test_a_limit_is_never_raised(make_engine: MakeEngine, inputs: list[ModelInput]) -> None:
    """A prompt beyond the limit is prefilled whole; half of it may still be more than the limit."""
    length = len(inputs[2].prompt_token_ids)
    engine = _small(make_engine(max_num_tokens=5), max_tokens=length - 1)
    assert _answers(engine, inputs[2:3]) == _answers(make_engine(), inputs[2:3])
    assert engine.scheduler.limits.max_num_tokens == 5


def test_tiles_that_are_encoded_already_are_not_encoded_again(
    make_engine: MakeEngine, make_input: MakeInput, make_tiles: MakeTiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory ends while the first image of a batch has its features and the second has not."""
    engine, images = make_engine(tile_batch=16), [make_tiles(1, 2, seed=1), make_tiles(1, 2, seed=2)]
    encoded: list[list[tuple[int, int]]] = []
    encode = engine.runner.encode

    def failing(spans: list[TileSpan]) -> None:
        encoded.append([(span.start, span.stop) for span in spans])
        if len(encoded) == 1:
            encode(spans[:1])
            raise torch.OutOfMemoryError
        encode(spans)

    monkeypatch.setattr(engine.runner, "encode", failing)
    prompts = [make_input(image) for image in images]
    assert _answers(engine, prompts) == _answers(make_engine(), prompts)
    assert encoded == [[(0, 3), (0, 3)], [(0, 3)]]


def test_each_halving_is_told(
    make_engine: MakeEngine, inputs: list[ModelInput], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "smolvlm"):
        _answers(_small(make_engine(tile_batch=16), max_tiles=5), inputs)
    told = "the device ran out of memory; from here on at most {} tiles per encoder batch"
    assert [record.getMessage() for record in caplog.records] == [told.format(8), told.format(4)]


@pytest.mark.parametrize("limits", [{"max_tiles": 0}, {"max_tokens": 0}])
def test_no_memory_for_a_single_one_is_an_error(
    make_engine: MakeEngine, inputs: list[ModelInput], limits: dict[str, int]
) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        _small(make_engine(), **limits).generate(inputs, GREEDY)


def test_no_memory_for_a_decode_is_an_error(
    make_engine: MakeEngine, inputs: list[ModelInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()

    def failing(sequences: list[Sequence]) -> Chosen:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(engine.runner, "decode", failing)
    with pytest.raises(torch.OutOfMemoryError):
        engine.generate(inputs[:1], GREEDY)
