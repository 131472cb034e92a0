"""Prompts that begin alike share pages: less work, the same answers."""

import itertools
from dataclasses import dataclass, replace

import pytest
from fixture_types import MakeEngine, MakeInput, MakeTiles
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smolvlm import Engine, SamplingParams
from smolvlm.engine import BATCH, ONLINE
from smolvlm.engine.images import TileSpan
from smolvlm.engine.runner import Chosen
from smolvlm.engine.sequence import Sequence
from smolvlm.processor import ModelInput

GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)
BLOCK = 16


@dataclass
class Work:
    """What a runner was asked to do."""

    tiles: int = 0
    prompt_tokens: int = 0


@pytest.fixture
def plain(make_engine: MakeEngine) -> Engine:
    """An engine without prefix caching."""
    return make_engine(max_num_sequences=4, prefix_caching=False)


@pytest.fixture
def work(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Work:
    done, encode, prefill = Work(), engine.runner.encode, engine.runner.prefill

    def encoding(spans: list[TileSpan]) -> None:
        done.tiles += sum(span.stop - span.start for span in spans)
        encode(spans)

    def prefilling(sequences: list[Sequence]) -> Chosen:
        done.prompt_tokens += sum(sequence.num_scheduled - sequence.num_computed for sequence in sequences)
        return prefill(sequences)

    monkeypatch.setattr(engine.runner, "encode", encoding)
    monkeypatch.setattr(engine.runner, "prefill", prefilling)
    return done


def _answer(engine: Engine, model_input: ModelInput, priority: int = ONLINE, length: int = 12) -> Sequence:
    sequence = engine.add(model_input, replace(GREEDY, max_new_tokens=length), priority)
    while sequence.finish_reason is None:
        engine.step()
    return sequence


def _alone(plain: Engine, model_input: ModelInput) -> list[int]:
    return plain.generate([model_input], GREEDY)[0].token_ids


@pytest.mark.parametrize("over", [0, 1, 7])
def test_the_next_turn_computes_only_what_is_new(
    engine: Engine, plain: Engine, work: Work, make_input: MakeInput, make_tiles: MakeTiles, over: int
) -> None:
    """The image comes again as another object with equal pixels, and is not encoded again. The answer ends so many
    tokens behind a block: where none, its last token, which was never computed, keeps that block from being known."""
    question = make_input(make_tiles(2, 3, seed=1))
    first = _answer(engine, question, length=2 * BLOCK + over - len(question.prompt_token_ids) % BLOCK)
    tokens = first.prompt_token_ids + first.token_ids
    assert len(tokens) % BLOCK == over
    assert (work.tiles, work.prompt_tokens) == (7, len(first.prompt_token_ids))
    turn = ModelInput([*tokens, 5, 6, 7, 8], [make_tiles(2, 3, seed=1)])
    second = _answer(engine, turn)
    known = (len(tokens) - 1) // BLOCK * BLOCK
    assert (work.tiles, work.prompt_tokens) == (7, len(first.prompt_token_ids) + len(turn.prompt_token_ids) - known)
    assert second.completion().cached_tokens == known
    assert second.token_ids == _alone(plain, turn)


def test_another_image_in_the_same_words_is_another_prompt(
    engine: Engine, plain: Engine, work: Work, make_input: MakeInput, make_tiles: MakeTiles
) -> None:
    prompts = [make_input(make_tiles(1, 2, seed=seed)) for seed in (1, 2)]
    answers = [_answer(engine, prompt) for prompt in prompts]
    assert [answer.num_cached for answer in answers] == [0, 0]
    assert (work.tiles, work.prompt_tokens) == (6, sum(len(prompt.prompt_token_ids) for prompt in prompts))
    assert [answer.token_ids for answer in answers] == [_alone(plain, prompt) for prompt in prompts]


def test_only_tiles_with_tokens_behind_the_known_beginning_are_encoded(
    engine: Engine, plain: Engine, work: Work, make_input: MakeInput, make_tiles: MakeTiles
) -> None:
    """Of the first image that is the last of its three tiles, which shares a block with the second image."""
    _answer(engine, make_input(make_tiles(1, 2, seed=1), make_tiles(2, 2, seed=2)))
    assert work.tiles == 8
    mixed = make_input(make_tiles(1, 2, seed=1), make_tiles(2, 2, seed=3), make_tiles(seed=4))
    answer = _answer(engine, mixed)
    assert work.tiles == 8 + 1 + 5 + 1
    assert answer.num_cached == BLOCK
    assert answer.token_ids == _alone(plain, mixed)


def test_an_equal_prompt_computes_its_last_block_alone(
    engine: Engine, plain: Engine, work: Work, make_input: MakeInput, make_tiles: MakeTiles
) -> None:
    prompt = make_input(make_tiles(2, 2, seed=1), text="x" * 40)
    answers = [_answer(engine, prompt).token_ids for _ in range(3)]
    length = len(prompt.prompt_token_ids)
    assert work.prompt_tokens == length + 2 * (length - (length - 1) // BLOCK * BLOCK)
    assert answers == [_alone(plain, prompt)] * 3


@pytest.mark.parametrize("priority", [BATCH, ONLINE])
def test_tasks_on_one_image_prefill_it_once(
    engine: Engine, plain: Engine, work: Work, make_input: MakeInput, make_tiles: MakeTiles, priority: int
) -> None:
    image = make_tiles(2, 3, seed=1)
    tasks = [make_input(image, text=text) for text in ("Caption?", "Text?", "Colours?", "Objects?")]
    sequences = [engine.add(task, GREEDY, priority) for task in tasks]
    while engine.has_unfinished:
        engine.step()
    columns = zip(*(task.prompt_token_ids for task in tasks), strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns)) // BLOCK * BLOCK
    assert shared > 0
    assert work.tiles == 7
    assert work.prompt_tokens == sum(len(task.prompt_token_ids) for task in tasks) - 3 * shared
    assert [sequence.num_cached for sequence in sequences] == [0, shared, shared, shared]
    assert [sequence.token_ids for sequence in sequences] == [_alone(plain, task) for task in tasks]


def test_one_that_waits_for_a_common_beginning_goes_on_alone_if_that_is_aborted(
    engine: Engine, plain: Engine, make_input: MakeInput, make_tiles: MakeTiles
) -> None:
    image = make_tiles(2, 3, seed=1)
    first, second = (engine.add(make_input(image, text=text), GREEDY) for text in ("Caption?", "Text?"))
    while not first.is_encoded:
        engine.step()
    engine.abort(first)
    while engine.has_unfinished:
        engine.step()
    assert second.token_ids == _alone(plain, make_input(image, text="Text?"))


def test_online_prompts_outlive_batch_work(engine: Engine, make_input: MakeInput, make_tiles: MakeTiles) -> None:
    prompt = make_input(make_tiles(2, 3, seed=1))
    _answer(engine, prompt)
    fill = engine.scheduler.blocks.num_blocks * BLOCK // engine.max_tokens + 2
    engine.generate([make_input(text="word " * 600 + str(number)) for number in range(fill)], GREEDY)
    assert _answer(engine, prompt).num_cached == (len(prompt.prompt_token_ids) - 1) // BLOCK * BLOCK


def test_a_full_cache_forgets_the_oldest(
    make_engine: MakeEngine, plain: Engine, make_input: MakeInput, make_tiles: MakeTiles
) -> None:
    engine = make_engine(kv_cache_bytes=2**17)
    prompts = [make_input(make_tiles(1, 2, seed=seed)) for seed in range(9)]
    expected = [_alone(plain, prompt) for prompt in prompts]
    for _ in range(2):
        assert [_answer(engine, prompt).token_ids for prompt in prompts] == expected
    assert _answer(engine, prompts[-1]).num_cached > 0
    assert _answer(engine, prompts[0]).num_cached == 0


def test_draws_do_not_depend_on_how_a_prompt_is_cut(
    make_engine: MakeEngine, make_input: MakeInput, make_tiles: MakeTiles
) -> None:
    drawn = replace(GREEDY, temperature=0.9, seed=7)
    prompt, answers = make_input(make_tiles(2, 3, seed=1), text="x" * 40), []
    for max_num_tokens in (1000, 10):
        engine = make_engine(max_num_tokens=max_num_tokens)
        engine.add(make_input(text="Hi"), replace(GREEDY, max_new_tokens=100), ONLINE)
        sequence = engine.add(prompt, drawn)
        while engine.has_unfinished:
            engine.step()
        answers.append(sequence.token_ids)
    assert answers[0] == answers[1] == engine.generate([prompt], drawn)[0].token_ids


def test_without_caching_nothing_is_shared(plain: Engine, make_input: MakeInput) -> None:
    prompt = make_input(text="x" * 60)
    assert [_answer(plain, prompt).num_cached for _ in range(2)] == [0, 0]
    assert plain.counters.cached_tokens == 0


@dataclass(frozen=True)
class Join:
    """A sequence of the random mix: which prompt, how long an answer, which class, after how many steps it joins, and
    after how many more it is aborted (None: never)."""

    prompt: int
    length: int
    priority: int
    steps: int
    aborted_after: int | None


joins = st.builds(
    Join,
    prompt=st.integers(0, 9),
    length=st.integers(1, 20),
    priority=st.sampled_from([BATCH, ONLINE]),
    steps=st.integers(0, 6),
    aborted_after=st.none() | st.integers(0, 12),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=st.lists(joins, min_size=1, max_size=14), cache_bytes=st.sampled_from([2**18, 2**22]))
def test_answers_are_those_without_caching_whoever_joins_and_leaves(
    plan: list[Join],
    cache_bytes: int,
    make_engine: MakeEngine,
    prompts: list[ModelInput],
    expected: list[list[int]],
) -> None:
    """Prompts are cut in small pieces, pages are scarce or not, and equal images come as equal or as other objects."""
    engine = make_engine(max_num_sequences=3, max_num_tokens=40, kv_cache_bytes=cache_bytes)
    sequences: list[Sequence] = []
    ends: dict[int, list[Sequence]] = {}
    for number, join in enumerate(plan):
        params = replace(GREEDY, max_new_tokens=join.length)
        sequence = engine.add(prompts[join.prompt], params, join.priority)
        sequences.append(sequence)
        if join.aborted_after is not None:
            ends.setdefault(number + join.aborted_after, []).append(sequence)
        for _ in range(join.steps):
            engine.step()
        for victim in ends.pop(number, []):
            engine.abort(victim)
    while engine.has_unfinished:
        engine.step()
    for join, sequence in zip(plan, sequences, strict=True):
        tokens = expected[join.prompt][: join.length]
        aborted = sequence.finish_reason == "aborted"
        assert sequence.token_ids == (tokens[: len(sequence.token_ids)] if aborted else tokens)
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks
    assert len(engine.scheduler.images) == 0


@pytest.fixture(scope="module")
def prompts(make_input: MakeInput, make_tiles: MakeTiles) -> list[ModelInput]:
    """Families with common beginnings: one image, equal images, several images, text alone."""
    image, other = make_tiles(2, 3, seed=1), make_tiles(1, 2, seed=2)
    text = "Once upon a time there was a small model that read pages. "
    return [
        make_input(image, text="Caption?"),
        make_input(image, text="Read all of it, please."),
        make_input(make_tiles(2, 3, seed=1), text="Caption?"),
        make_input(image, other, text="Compare."),
        make_input(image, make_tiles(1, 2, seed=3), text="Compare."),
        make_input(other, image, text="Compare."),
        make_input(text=text + "What did it say?"),
        make_input(text=text * 3 + "What did it say?"),
        make_input(text=text * 3 + "And then?"),
        make_input(text="Hi"),
    ]


@pytest.fixture(scope="module")
def expected(make_engine: MakeEngine, prompts: list[ModelInput]) -> list[list[int]]:
    """Each prompt's answer, alone and without caching."""
    engine = make_engine(prefix_caching=False)
    return [engine.generate([prompt], replace(GREEDY, max_new_tokens=20))[0].token_ids for prompt in prompts]
