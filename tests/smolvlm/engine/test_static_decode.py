"""Decoding in buckets of static buffers, on a CPU: the same answers as the plain path, whoever joins and leaves."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from fixture_types import MakeEngine, MakeInput, MakeTiles
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smolvlm import Engine, SamplingParams
from smolvlm.attention import paged_decode
from smolvlm.engine.cuda_graph import captured
from smolvlm.engine.runner import default_decode
from smolvlm.engine.sequence import ONLINE, Sequence, Token
from smolvlm.engine.static_decode import ONLINE_STEPS, DecodeAttention, StaticDecoder, Step, bucket_size
from smolvlm.kernels.paged_decode import fused_paged_decode
from smolvlm.model import SmolVLM
from smolvlm.processor import ModelInput

CPU = torch.device("cpu")
GREEDY = SamplingParams(max_new_tokens=20, ignore_eos=True)


def _warm_up(step: Step) -> Step:
    """As a capture does: run the step, on padding, before the first replay."""
    step()
    step()
    return step


def _use_buckets(engine: Engine, attention: DecodeAttention = paged_decode) -> StaticDecoder:
    runner = engine.runner
    runner.static = StaticDecoder(runner.model, runner.cache, runner.device, attention, _warm_up)
    return runner.static


@pytest.fixture
def static(make_engine: MakeEngine) -> Iterator[Engine]:
    engine = make_engine(max_num_sequences=5)
    _use_buckets(engine)
    yield engine
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks


@pytest.fixture(scope="module")
def inputs(make_input: MakeInput, make_tiles: MakeTiles) -> list[ModelInput]:
    image = make_tiles(2, 3, seed=1)
    texts = ("Good morning.", "Hi", "Once upon a time there was a small model that read pages.")
    return [
        make_input(image, text="Read."),
        make_input(image),
        make_input(make_tiles(seed=2)),
        *(make_input(text=text) for text in texts),
    ]


@pytest.fixture(scope="module")
def expected(make_engine: MakeEngine, inputs: list[ModelInput]) -> list[list[int]]:
    """Answers of the plain path, each alone."""
    engine = make_engine()
    return [engine.generate([each], GREEDY)[0].token_ids for each in inputs]


def test_buckets_are_powers_of_two_then_multiples_of_64() -> None:
    sizes = [bucket_size(batch) for batch in range(1, 400)]
    assert sorted(set(sizes)) == [1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448]
    assert all(size >= batch for batch, size in enumerate(sizes, 1))
    assert [bucket_size(size) for size in set(sizes)] == list(set(sizes))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    plan=st.lists(
        st.tuples(st.integers(0, 5), st.integers(1, 20), st.integers(0, 6), st.none() | st.integers(0, 9)),
        min_size=1,
        max_size=12,
    )
)
def test_answers_are_those_of_the_plain_path_whoever_joins_and_leaves(
    static: Engine,
    inputs: list[ModelInput],
    expected: list[list[int]],
    plan: list[tuple[int, int, int, int | None]],
) -> None:
    """plan: (input, answer length, steps before the next joins, entries after which it is aborted)."""
    sequences: list[Sequence] = []
    for index, length, steps, _ in plan:
        sequences.append(static.add(inputs[index], replace(GREEDY, max_new_tokens=length)))
        for _ in range(steps):
            static.step()
        for sequence, (*_, after) in zip(sequences, plan, strict=False):
            if after is not None and len(sequences) >= after:
                static.abort(sequence)
    while static.has_unfinished:
        static.step()
    for sequence, (index, length, _, _) in zip(sequences, plan, strict=True):
        tokens = expected[index][:length]
        aborted = sequence.finish_reason == "aborted"
        assert sequence.token_ids == (tokens[: len(sequence.token_ids)] if aborted else tokens)


def test_draws_and_alternatives_are_those_of_the_plain_path(
    static: Engine, make_engine: MakeEngine, inputs: list[ModelInput]
) -> None:
    """Greedy and drawn rows in one batch, some with alternatives."""
    params = [
        replace(GREEDY, temperature=0.9 * (index % 2), top_p=0.9, seed=index, top_logprobs=index % 3)
        for index in range(len(inputs))
    ]
    heard, plain = _listen(static, inputs, params), _listen(make_engine(), inputs, params)
    assert [[token.token_id for token in tokens] for tokens in heard] == [
        [token.token_id for token in tokens] for tokens in plain
    ]
    for ours, theirs in zip((token for each in heard for token in each), _flat(plain), strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert [token_id for token_id, _ in ours.top] == [token_id for token_id, _ in theirs.top]
        assert [value for _, value in ours.top] == pytest.approx([value for _, value in theirs.top], abs=1e-4)
    assert {len(token.top) for token in _flat(heard)} == {0, 1, 2}


def _flat(tokens: list[list[Token]]) -> Iterator[Token]:
    return (token for each in tokens for token in each)


def _listen(engine: Engine, inputs: list[ModelInput], params: list[SamplingParams]) -> list[list[Token]]:
    """Every token of every answer as it comes out."""
    heard: list[list[Token]] = [[] for _ in inputs]
    for model_input, each, tokens in zip(inputs, params, heard, strict=True):
        engine.enqueue(engine.prepare(model_input, each, on_token=tokens.append))
    while engine.has_unfinished:
        engine.step()
    return heard


def test_each_bucket_is_captured_once_and_greedy_batches_do_not_sort(
    make_engine: MakeEngine, inputs: list[ModelInput]
) -> None:
    engine = make_engine()
    decoder = _use_buckets(engine)
    for _ in range(2):
        engine.generate(inputs[:3], GREEDY)
        engine.generate(inputs[:3], replace(GREEDY, temperature=1.0, seed=1))
        engine.generate(inputs[:1], GREEDY)
    assert set(decoder._buckets) == {(4, False), (4, True), (1, False)}


def test_padding_writes_to_the_block_that_belongs_to_nobody(make_engine: MakeEngine, inputs: list[ModelInput]) -> None:
    engine = make_engine()
    _use_buckets(engine)
    sequences = [engine.add(each, GREEDY) for each in inputs[:3]]
    while not all(sequence.token_ids for sequence in sequences):
        engine.step()
    storage, held = engine.runner.cache.storage, {block for each in sequences for block in each.block_table}
    others = [block for block in range(len(storage[0]) - 1) if block not in held]
    before = storage[:, others].clone()
    storage[:, engine.runner.cache.scratch] = 0
    engine.step()
    torch.testing.assert_close(storage[:, others], before, rtol=0, atol=0)
    assert storage[:, engine.runner.cache.scratch, 0].any()
    assert not storage[:, engine.runner.cache.scratch, 1:].any()
    for sequence in sequences:
        engine.abort(sequence)


def test_a_sequence_keeps_its_row_and_padding_stays_where_it_is(
    make_engine: MakeEngine, inputs: list[ModelInput]
) -> None:
    engine = make_engine(max_num_sequences=4)
    long = replace(GREEDY, max_new_tokens=64)
    decoder = _use_buckets(engine)
    sequences = [engine.add(each, long) for each in inputs[:4]]
    while not all(sequence.token_ids for sequence in sequences):
        engine.step()
    engine.step()
    bucket = decoder._buckets[4, False]
    rows = bucket.seat(sequences)
    assert sorted(rows) == [0, 1, 2, 3]
    engine.abort(sequences[1])
    rest = [sequences[0], *sequences[2:]]
    engine.step()
    assert bucket.seat(rest) == [rows[0], *rows[2:]]
    assert set(bucket.table[rows[1]].tolist()) == {engine.runner.cache.scratch}
    ahead = decoder._ahead
    assert ahead is not None
    assert bucket.cursor[1, rows].tolist() == [
        0 if sequence is sequences[1] else sequence.num_tokens - 1 + ahead.num_coming(sequence)
        for sequence in sequences
    ]
    newcomer = engine.add(inputs[5], long)
    while len(newcomer.token_ids) < 2:
        engine.step()
    assert bucket.seat([*rest, newcomer]) == [rows[0], *rows[2:], rows[1]]
    for sequence in (*sequences, newcomer):
        engine.abort(sequence)


def test_the_fused_kernel_in_the_engine(
    make_engine: MakeEngine, inputs: list[ModelInput], expected: list[list[int]]
) -> None:
    """What runs on a GPU, but for the graph: static buckets around the kernel, here interpreted."""
    engine = make_engine()
    _use_buckets(engine, fused_paged_decode)
    lengths = (6, 3, 4)
    done = engine.generate(inputs[1:4], [replace(GREEDY, max_new_tokens=length) for length in lengths])
    expectation = [tokens[:length] for tokens, length in zip(expected[1:4], lengths, strict=True)]
    assert [completion.token_ids for completion in done] == expectation


def test_graphs_are_the_default_on_a_gpu_alone() -> None:
    assert (default_decode(torch.device("cuda", 1)), default_decode(CPU)) == ("graph", "eager")


def test_a_missing_triton_is_named(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_engine().runner
    assert isinstance(runner.model, SmolVLM)
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [name for name in sys.modules if name.startswith("smolvlm.kernels.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"needs triton, .* install it, or pass decode='eager'"):
        captured(runner.model, runner.cache, torch.device("cuda"))


def test_decode_modes_that_cannot_be_are_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="decode is 'graph' and device 'cpu'; CUDA graphs need a CUDA device"):
        Engine.from_pretrained(tiny_checkpoint, decode="graph")
    with pytest.raises(ValueError, match="decode is 'fast'; it must be 'eager' or 'graph'"):
        Engine.from_pretrained(tiny_checkpoint, decode="fast")  # type: ignore[arg-type]


def test_what_a_visit_chooses_behind_the_end_token_is_thrown_away(
    static: Engine, inputs: list[ModelInput], expected: list[list[int]]
) -> None:
    """The end token comes in the middle of a visit, while the next one is under way; the others go on."""
    end = expected[0][3]
    length = expected[0].index(end) + 1
    static._eos_token_ids = frozenset({end})
    heard: list[Token] = []
    stopping = static.prepare(inputs[0], replace(GREEDY, ignore_eos=False), on_token=heard.append)
    static.enqueue(stopping)
    other = static.add(inputs[1], GREEDY)
    before = static.counters.generated_tokens
    while static.has_unfinished:
        static.step()
    assert (stopping.finish_reason, stopping.token_ids) == ("stop", expected[0][:length])
    assert [token.token_id for token in heard] == stopping.token_ids
    assert other.token_ids == expected[1]
    assert static.counters.generated_tokens - before == length + len(expected[1])


def test_pages_of_the_aborted_go_to_others_while_a_visit_is_under_way(
    make_engine: MakeEngine, inputs: list[ModelInput], expected: list[list[int]]
) -> None:
    """The visit still writes for the aborted one; whoever gets its pages next writes them anew."""
    engine = make_engine(max_num_sequences=2)
    decoder = _use_buckets(engine)
    first, second = engine.add(inputs[0], GREEDY), engine.add(inputs[1], GREEDY)
    while len(second.token_ids) < 2:
        engine.step()
    assert decoder._ahead is not None
    assert decoder._ahead.num_coming(first) > 0
    given_back = set(first.block_table)
    engine.abort(first)
    newcomer = engine.add(inputs[2], GREEDY)
    engine.step()
    assert given_back & set(newcomer.block_table)
    while engine.has_unfinished:
        engine.step()
    assert [second.token_ids, newcomer.token_ids] == [expected[1], expected[2]]


def test_online_answers_come_in_short_visits(static: Engine, inputs: list[ModelInput]) -> None:
    sequence = static.add(inputs[3], GREEDY, priority=ONLINE)
    counts = [0]
    while static.has_unfinished:
        static.step()
        counts.append(len(sequence.token_ids))
    assert max(b - a for a, b in pairwise(counts)) == ONLINE_STEPS
