"""The engine on the tiny checkpoint: joining, leaving and sharing change nothing in the answers."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fixture_types import MakeEngine, MakeInput, MakeTiles
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smolvlm import Engine, SamplingParams
from smolvlm.engine import Completion, PromptTooLong
from smolvlm.engine.images import TileSpan
from smolvlm.engine.sequence import Sequence
from smolvlm.image import Tiles
from smolvlm.model import SmolVLM
from smolvlm.processor import ModelInput

GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)


@pytest.fixture
def inputs(make_input: MakeInput, make_tiles: MakeTiles) -> list[ModelInput]:
    """No image, one, several, one that is split; prompts of uneven length."""
    return [
        make_input(text="Good morning."),
        make_input(make_tiles(seed=1)),
        make_input(make_tiles(2, 3, seed=2), text="Read all of it, please."),
        make_input(make_tiles(seed=3), make_tiles(1, 2, seed=4), make_tiles(seed=5)),
        make_input(make_tiles(seed=6), text="And this?"),
        make_input(text="Good evening."),
    ]


def _tokens(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


def _same(ours: list[Completion], theirs: list[Completion]) -> bool:
    """Equal answers; log-probabilities may differ by rounding between batches."""
    pairs = list(zip(ours, theirs, strict=True))
    near = all(abs(one.mean_logprob - other.mean_logprob) < 1e-4 for one, other in pairs)
    return near and all(replace(one, mean_logprob=other.mean_logprob) == other for one, other in pairs)


def test_answers_come_in_order_and_equal_those_alone(engine: Engine, inputs: list[ModelInput]) -> None:
    params = [replace(GREEDY, max_new_tokens=length) for length in (12, 3, 20, 1, 7, 9)]
    together = engine.generate(inputs, params)
    alone = [engine.generate([each], one)[0] for each, one in zip(inputs, params, strict=True)]
    assert [done.output_tokens for done in together] == [12, 3, 20, 1, 7, 9]
    assert [done.prompt_tokens for done in together] == [len(each.prompt_token_ids) for each in inputs]
    assert _same(together, alone)
    assert len({tuple(tokens) for tokens in _tokens(together)}) == len(inputs)


@pytest.mark.parametrize(
    "limits",
    [
        {"max_num_sequences": 1},
        {"max_num_tokens": 1},
        {"tile_batch": 1},
        {"tile_batch": 5, "max_num_sequences": 64, "max_num_tokens": 10_000},
        {"kv_cache_bytes": 2**17},
    ],
)
def test_limits_change_the_pace_and_not_the_answers(
    engine: Engine, make_engine: MakeEngine, inputs: list[ModelInput], limits: dict[str, int]
) -> None:
    assert _same(make_engine(**limits).generate(inputs, GREEDY), engine.generate(inputs, GREEDY))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 20), st.integers(0, 6)), min_size=1, max_size=12))
def test_sequences_that_join_and_leave_at_any_time(
    engine: Engine, inputs: list[ModelInput], plan: list[tuple[int, int, int]]
) -> None:
    """plan: (input, answer length, steps before it joins)."""
    sequences = []
    for index, length, steps in plan:
        for _ in range(steps):
            engine.step()
        sequences.append((index, engine.add(inputs[index], replace(GREEDY, max_new_tokens=length))))
    while engine.has_unfinished:
        engine.step()
    longest = _tokens(engine.generate(inputs, replace(GREEDY, max_new_tokens=20)))
    for index, sequence in sequences:
        assert sequence.token_ids == longest[index][: sequence.max_new_tokens]


def test_seeded_sampling_does_not_depend_on_the_batch(engine: Engine, inputs: list[ModelInput]) -> None:
    params = [replace(GREEDY, temperature=0.9, top_p=0.95, seed=seed) for seed in range(len(inputs))]
    together = engine.generate(inputs, params)
    alone = [engine.generate([each], one)[0] for each, one in zip(inputs, params, strict=True)]
    assert _tokens(together) == _tokens(alone)
    assert _tokens(together) == _tokens(engine.generate(inputs, params))
    reseeded = [replace(each, seed=100 + index) for index, each in enumerate(params)]
    assert _tokens(together) != _tokens(engine.generate(inputs, reseeded))


def test_sampling_without_a_seed_varies(engine: Engine, inputs: list[ModelInput]) -> None:
    params = replace(GREEDY, temperature=2.0, max_new_tokens=20)
    first, second = engine.generate([inputs[1]] * 2, params)
    assert first.token_ids != second.token_ids


def test_an_end_token_stops(engine: Engine, inputs: list[ModelInput]) -> None:
    """The sixth greedy token is declared an end token."""
    free = engine.generate(inputs[:1], GREEDY)[0].token_ids
    end = free[5]
    engine._eos_token_ids = frozenset({end})
    done = engine.generate(inputs[:1], replace(GREEDY, ignore_eos=False))[0]
    assert (done.token_ids, done.finish_reason) == (free[: free.index(end) + 1], "stop")


def test_a_loop_is_ended_as_repetition(make_engine: MakeEngine, inputs: list[ModelInput]) -> None:
    """A final norm of zeros makes all logits equal: the first token for ever."""
    engine = make_engine()
    assert isinstance(engine.runner.model, SmolVLM)
    engine.runner.model.text.norm.weight.zero_()
    params = SamplingParams(max_new_tokens=300, repetition_window=60)
    done = engine.generate(inputs[:1], params)[0]
    assert (done.finish_reason, done.output_tokens) == ("repetition", 60)
    switched_off = replace(params, repetition_window=None)
    assert engine.generate(inputs[:1], switched_off)[0].finish_reason == "length"


def test_mean_logprob_is_that_of_the_chosen_tokens(engine: Engine, inputs: list[ModelInput]) -> None:
    import torch

    from smolvlm.attention import packed_prefill

    done = engine.generate(inputs[:1], GREEDY)[0]
    model, ids = engine.runner.model, torch.tensor(inputs[0].prompt_token_ids + done.token_ids[:-1])
    logits = model(model.embed(ids), packed_prefill((len(ids),), ids.device))[-len(done.token_ids) :]
    chosen = logits.log_softmax(-1).gather(1, torch.tensor(done.token_ids).unsqueeze(1))
    assert done.mean_logprob == pytest.approx(chosen.mean().item(), abs=1e-4)


def test_one_image_in_several_inputs_is_encoded_once(
    engine: Engine, make_input: MakeInput, make_tiles: MakeTiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = engine.runner.encode

    def counting(spans: list[TileSpan]) -> None:
        encoded.append(sum(span.stop - span.start for span in spans))
        encode(spans)

    monkeypatch.setattr(engine.runner, "encode", counting)
    shared, copy = make_tiles(1, 2, seed=9), make_tiles(1, 2, seed=9)
    tasks = [make_input(shared, text=text) for text in ("Caption?", "Text?", "Colours?", "Objects?", "Mood?", "Place?")]
    together = engine.generate(tasks, GREEDY)
    assert sum(encoded) == 3
    separate = [engine.generate([make_input(copy, text="Caption?")], GREEDY)[0], *together[1:]]
    assert _same(together, separate)


def test_tiles_and_features_are_dropped_when_used_up(engine: Engine, inputs: list[ModelInput]) -> None:
    sequence = engine.add(inputs[2], GREEDY)
    image = sequence.images[0]
    while not image.is_encoded:
        engine.step()
    assert image.pixels is None
    engine.step()
    assert (image.features, sequence.images, sequence.tiles) == (None, [], [])
    engine.abort(sequence)


@pytest.mark.parametrize("steps", [0, 1, 3, 9])
def test_abort_at_any_moment_frees_its_memory_and_leaves_the_others(
    engine: Engine, inputs: list[ModelInput], steps: int
) -> None:
    expected = _tokens(engine.generate(inputs, GREEDY))
    sequences = [engine.add(each, GREEDY) for each in inputs]
    for _ in range(steps):
        engine.step()
    for victim in sequences[::2]:
        engine.abort(victim)
    while engine.has_unfinished:
        assert not set(engine.step()) & set(sequences[::2])
    for victim, tokens in list(zip(sequences, expected, strict=True))[::2]:
        done = victim.completion()
        assert done.finish_reason == "aborted"
        assert done.token_ids == tokens[: len(done.token_ids)]
        assert done.mean_logprob < 0 or not done.token_ids
    assert [sequence.token_ids for sequence in sequences[1::2]] == expected[1::2]


def test_a_mix_of_everything_leaves_nothing_behind(engine: Engine, inputs: list[ModelInput]) -> None:
    rng = random.Random(0)
    live: list[Sequence] = []
    for _ in range(300):
        if rng.random() < 0.3:
            params = SamplingParams(max_new_tokens=rng.randint(1, 30), temperature=rng.choice([0.0, 1.0]))
            live.append(engine.add(rng.choice(inputs), params, priority=rng.randint(0, 2)))
        if live and rng.random() < 0.1:
            engine.abort(live.pop(rng.randrange(len(live))))
        finished = engine.step()
        live = [sequence for sequence in live if sequence not in finished]
    while engine.has_unfinished:
        engine.step()
    assert all(sequence.finish_reason is not None for sequence in live)


def test_higher_priority_finishes_first(make_engine: MakeEngine, inputs: list[ModelInput]) -> None:
    engine = make_engine(max_num_sequences=1)
    order = [engine.add(inputs[0], GREEDY, priority) for priority in (0, 1, 2)]
    finished = [sequence for _ in range(60) for sequence in engine.step()]
    assert finished == order[::-1]


def test_an_answer_is_cut_where_the_context_ends(engine: Engine, make_input: MakeInput) -> None:
    long = make_input(text="word " * 600)
    sequence = engine.add(long, SamplingParams(max_new_tokens=10_000))
    assert sequence.max_new_tokens == engine.max_tokens - len(long.prompt_token_ids)
    engine.abort(sequence)


def test_an_answer_is_cut_where_the_cache_ends(make_engine: MakeEngine, inputs: list[ModelInput]) -> None:
    small = make_engine(kv_cache_bytes=2**16)
    done = small.generate(inputs[:1], SamplingParams(max_new_tokens=10_000, ignore_eos=True))[0]
    assert done.finish_reason == "length"
    assert done.prompt_tokens + done.output_tokens == small.max_tokens


def test_a_prompt_beyond_the_context_is_refused(engine: Engine, make_input: MakeInput) -> None:
    long = make_input(text="word " * 3000)
    with pytest.raises(PromptTooLong, match=rf"prompt has {len(long.prompt_token_ids)} tokens; .* use fewer"):
        engine.add(long, GREEDY)


def test_one_bad_input_stops_the_call_before_it_starts(engine: Engine, inputs: list[ModelInput]) -> None:
    bad = ModelInput([1, 10**6], [])
    with pytest.raises(ValueError, match="input 1: prompt token id 1000000 lies outside the vocabulary"):
        engine.generate([inputs[0], bad], GREEDY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda good: ModelInput([], []), "prompt_token_ids is empty"),
        (lambda good: ModelInput([-1], []), "prompt token id -1 lies outside"),
        (lambda good: ModelInput(good.prompt_token_ids, []), "its tiles make 0"),
        (lambda good: ModelInput([1, 2], good.tiles), "prompt has 0 image tokens"),
        (
            lambda good: ModelInput(good.prompt_token_ids, [Tiles(good.tiles[0].pixels[:, :9], 0, 0)]),
            "this model takes uint8",
        ),
        (
            lambda good: ModelInput(good.prompt_token_ids, [Tiles(good.tiles[0].pixels.astype(np.float32), 0, 0)]),
            "tiles are float32",
        ),
    ],
)
def test_an_input_that_does_not_fit_is_refused(
    engine: Engine, inputs: list[ModelInput], change: Callable[[ModelInput], ModelInput], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        engine.add(change(inputs[1]), GREEDY)


def test_one_params_for_each_input_or_one_for_all(engine: Engine, inputs: list[ModelInput]) -> None:
    with pytest.raises(ValueError, match="2 SamplingParams for 6 inputs"):
        engine.generate(inputs, [GREEDY] * 2)
    assert engine.generate([], GREEDY) == []


def test_an_interrupted_call_takes_its_sequences_back(
    engine: Engine, inputs: list[ModelInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter(range(5))
    step = Engine.step

    def interrupted(self: Engine) -> list[Sequence]:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(inputs, GREEDY)


def test_bad_options_are_named(tiny_checkpoint: Path, make_engine: MakeEngine) -> None:
    with pytest.raises(ValueError, match="dtype is 'int8'; it must be one of auto, float32, bfloat16, float16"):
        Engine.from_pretrained(tiny_checkpoint, dtype="int8")
    with pytest.raises(ValueError, match="kv_cache_bytes is 10; one block of 16 tokens takes"):
        make_engine(kv_cache_bytes=10)
    with pytest.raises(ValueError, match="max_num_sequences is 0"):
        make_engine(max_num_sequences=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_generates(tiny_checkpoint: Path, inputs: list[ModelInput], dtype: str) -> None:
    engine = Engine.from_pretrained(tiny_checkpoint, dtype=dtype)
    exact = Engine.from_pretrained(tiny_checkpoint).generate(inputs, replace(GREEDY, max_new_tokens=1))
    rounded = engine.generate(inputs, replace(GREEDY, max_new_tokens=1))
    for one, other in zip(exact, rounded, strict=True):
        assert one.mean_logprob == pytest.approx(other.mean_logprob, abs=0.1)
