"""Keys and values in 8-bit floats: more of them in the same memory, one answer whichever way it is computed."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from fixture_types import MakeEngine, MakeInput, MakeTiles

from smolvlm import Engine, SamplingParams
from smolvlm.attention import paged_decode
from smolvlm.engine import BATCH, ONLINE
from smolvlm.engine.static_decode import DecodeAttention, StaticDecoder
from smolvlm.kernels.paged_decode import fused_paged_decode
from smolvlm.precision import E4M3
from smolvlm.processor import ModelInput

GREEDY = SamplingParams(max_new_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def inputs(make_input: MakeInput, make_tiles: MakeTiles) -> list[ModelInput]:
    image = make_tiles(1, 2, seed=1)
    pictures = [make_input(image, text="Read."), make_input(image)]
    return [*pictures, *(make_input(text=text) for text in ("Hi", "Why? " * 9))]


@pytest.fixture(scope="module")
def make_fp8(make_engine: MakeEngine) -> Callable[..., Engine]:
    return lambda **options: make_engine(kv_cache_dtype="fp8", **options)


@pytest.fixture(scope="module")
def alone(make_fp8: Callable[..., Engine], inputs: list[ModelInput]) -> list[list[int]]:
    """Answers without a neighbour and without a cached beginning."""
    engine = make_fp8(prefix_caching=False)
    return [engine.generate([each], GREEDY)[0].token_ids for each in inputs]


def test_the_same_memory_holds_four_times_as_many_tokens_as_in_float32(make_engine: MakeEngine) -> None:
    exact, rounded = (make_engine(kv_cache_bytes=2**20, kv_cache_dtype=dtype) for dtype in ("auto", "fp8"))
    assert rounded.runner.cache.storage.dtype == E4M3
    assert rounded.scheduler.blocks.num_blocks == 4 * exact.scheduler.blocks.num_blocks


def test_pages_of_a_prompt_are_rounded_in_every_layer(make_engine: MakeEngine, inputs: list[ModelInput]) -> None:
    """The keys of the first layer are those of float32, rounded; what later layers see follows from them."""
    exact, rounded = (make_engine(kv_cache_dtype=dtype) for dtype in ("auto", "fp8"))
    for engine in (exact, rounded):
        engine.generate(inputs[2:3], replace(GREEDY, max_new_tokens=1))
    first, second = (engine.runner.cache.storage[:, 0] for engine in (exact, rounded))
    assert (second.float() == first.to(E4M3).float())[0].all()
    assert (second.float() != 0).flatten(1).any(1).all()
    assert (second.float() != first).flatten(1).any(1).all()


def test_neighbours_and_cached_beginnings_change_no_answer(
    make_fp8: Callable[..., Engine], inputs: list[ModelInput], alone: list[list[int]]
) -> None:
    engine = make_fp8(max_num_sequences=3)
    for _ in range(2):
        assert [done.token_ids for done in engine.generate(inputs, GREEDY)] == alone
    assert engine.counters.cached_tokens > 0
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks


def test_an_aborted_answer_gives_its_pages_back_and_leaves_the_others_alone(
    make_fp8: Callable[..., Engine], inputs: list[ModelInput], alone: list[list[int]]
) -> None:
    engine = make_fp8()
    first, second = engine.add(inputs[0], GREEDY, BATCH), engine.add(inputs[1], GREEDY, ONLINE)
    while len(second.token_ids) == len(inputs[1].prompt_token_ids):
        engine.step()
    engine.abort(second)
    while first.finish_reason is None:
        engine.step()
    assert first.completion().token_ids == alone[0]
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks


@pytest.mark.parametrize("attention", [paged_decode, fused_paged_decode])
def test_replayed_steps_choose_the_same_tokens(
    make_fp8: Callable[..., Engine], inputs: list[ModelInput], alone: list[list[int]], attention: DecodeAttention
) -> None:
    """In Triton's interpreter for the fused kernel."""
    engine = make_fp8()
    runner = engine.runner
    runner.static = StaticDecoder(runner.model, runner.cache, runner.device, attention, lambda step: step)
    params = [replace(GREEDY, max_new_tokens=5 + 5 * index) for index in range(len(inputs))]
    found = engine.generate(inputs, params)
    assert [done.token_ids for done in found] == [ids[: 5 + 5 * index] for index, ids in enumerate(alone)]


def test_another_name_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match=r"kv_cache_dtype is 'int8'; it must be 'auto' or 'fp8'"):
        Engine.from_pretrained("/no/such/place", kv_cache_dtype="int8")
