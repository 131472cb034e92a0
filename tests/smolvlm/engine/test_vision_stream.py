"""Vision beside decode, on a CPU: no race on whatever device, and the answers of the plain path."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from fixture_types import MakeEngine, MakeInput, MakeTiles
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from two_streams import HandStream, Trace, TracedStream

from smolvlm import Engine, SamplingParams
from smolvlm.attention import paged_decode
from smolvlm.engine import cuda_graph
from smolvlm.engine.images import EncodedImage
from smolvlm.engine.scheduler import Scheduler
from smolvlm.engine.sequence import BATCH, ONLINE, Sequence
from smolvlm.engine.static_decode import StaticDecoder, Step
from smolvlm.engine.static_encode import StaticEncoder
from smolvlm.engine.vision_stream import Stream, VisionStream
from smolvlm.model import SmolVLM
from smolvlm.processor import ModelInput

GREEDY = SamplingParams(max_new_tokens=9, ignore_eos=True)
Plan = list[tuple[int, int, int, int, int | None]]


class Capture:
    """In place of GraphCapture: gives the step back as it is, with memory that all its recordings write on the way."""

    def __init__(self, device: torch.device, priority: int = 0) -> None:
        self.pool = torch.zeros(1)

    def __call__(self, step: Step) -> Step:
        def replay() -> None:
            self.pool.fill_(1)
            step()

        replay()
        return replay


def _beside(engine: Engine, stream: Stream, ahead_tiles: int = 12) -> Engine:
    """Give the encoder a second stream."""
    scheduler, vision = engine.scheduler, VisionStream(stream)
    limits = replace(scheduler.limits, ahead_tiles=ahead_tiles)
    engine.runner.vision, engine.scheduler = vision, Scheduler(limits, scheduler.blocks, vision)
    return engine


def _static(engine: Engine) -> Engine:
    """As with CUDA graphs: encoder and decode step over buffers that stay where they are, outputs included."""
    runner = engine.runner
    assert isinstance(runner.model, SmolVLM)
    outputs: dict[int, torch.Tensor] = {}

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        features = runner.model.encode_tiles(pixels)
        return outputs.setdefault(len(pixels), torch.empty_like(features)).copy_(features)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_graph, "GraphCapture", Capture)
        _, encoder, decoder = cuda_graph.captured(runner.model, runner.cache, runner.device)
    runner._encode = StaticEncoder(encode, encoder.capture)
    runner.static = StaticDecoder(runner.model, runner.cache, runner.device, paged_decode, decoder.capture)
    return engine


@pytest.fixture(scope="module")
def inputs(make_input: MakeInput, make_tiles: MakeTiles) -> list[ModelInput]:
    image = make_tiles(2, 3, seed=1)
    return [
        make_input(image, text="Read."),
        make_input(image, make_tiles(1, 2, seed=2)),
        make_input(make_tiles(seed=3)),
        make_input(make_tiles(2, 3, seed=1), text="Read."),
        make_input(make_tiles(2, 2, seed=4), make_tiles(3, 3, seed=5), text="Compare."),
        make_input(text="Good morning."),
    ]


@pytest.fixture(scope="module")
def expected(make_engine: MakeEngine, inputs: list[ModelInput]) -> list[list[int]]:
    """Answers of the plain path, each alone."""
    engine = make_engine()
    return [engine.generate([each], GREEDY)[0].token_ids for each in inputs]


def _follow(engine: Engine, inputs: list[ModelInput], plan: Plan) -> list[Sequence]:
    """plan: (input, answer length, priority, steps before the next joins, entries after which it is aborted)."""
    sequences: list[Sequence] = []
    for index, length, priority, steps, _ in plan:
        sequences.append(engine.add(inputs[index], replace(GREEDY, max_new_tokens=length), priority))
        for _ in range(steps):
            engine.step()
        for sequence, (*_, after) in zip(sequences, plan, strict=False):
            if after is not None and len(sequences) >= after:
                engine.abort(sequence)
    while engine.has_unfinished:
        engine.step()
    return sequences


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    plan=st.lists(
        st.tuples(
            st.integers(0, 5),
            st.integers(1, 9),
            st.sampled_from([BATCH, BATCH, ONLINE]),
            st.integers(0, 6),
            st.none() | st.integers(0, 9),
        ),
        min_size=1,
        max_size=8,
    ),
    overs=st.lists(st.booleans(), max_size=12),
    caches=st.booleans(),
    tile_batch=st.sampled_from([2, 4, 16]),
)
@pytest.mark.parametrize("is_static", [False, True])
def test_answers_are_those_of_one_stream_and_no_memory_is_touched_too_early(
    make_engine: MakeEngine,
    inputs: list[ModelInput],
    expected: list[list[int]],
    plan: Plan,
    overs: list[bool],
    caches: bool,
    tile_batch: int,
    is_static: bool,
) -> None:
    """overs: what the device answers, again and again, when it is asked whether a batch is over."""
    engine = make_engine(max_num_sequences=3, tile_batch=tile_batch, prefix_caching=caches, max_num_tokens=200)
    trace, answers = Trace(), itertools.cycle([*overs, False])
    _beside(_static(engine) if is_static else engine, TracedStream(trace, lambda: next(answers)))
    with trace:
        sequences = _follow(engine, inputs, plan)
        trace.check_freed()
    assert trace.races == []
    for sequence, (index, length, *_) in zip(sequences, plan, strict=True):
        tokens = expected[index][:length]
        aborted = sequence.finish_reason == "aborted"
        assert sequence.token_ids == (tokens[: len(sequence.token_ids)] if aborted else tokens)
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks
    assert len(engine.scheduler.images) == 0


def _without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def receive(self: VisionStream, number: int, features: list[torch.Tensor]) -> None:
        for each in features:
            self._stream.lend(each)

    monkeypatch.setattr(VisionStream, "receive", receive)


def _without_lending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TracedStream, "lend", lambda self, tensor: None)


def _without_copying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features stay in the static output, which the next batch overwrites."""

    def store(self: EncodedImage, start: int, features: torch.Tensor, batch: int = 0) -> None:
        self.features, self.pixels = features, None
        self._batches = [batch] * self.num_tiles

    monkeypatch.setattr(EncodedImage, "store", store)


def _with_one_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if encoder and decoder had been recorded by one GraphCapture."""
    pool = torch.zeros(1)
    monkeypatch.setattr(Capture, "__init__", lambda self, device, priority=0: setattr(self, "pool", pool))


@pytest.mark.parametrize("fault", [_without_waiting, _without_lending, _without_copying, _with_one_pool])
def test_the_trace_finds_what_would_be_a_race(
    make_engine: MakeEngine,
    make_input: MakeInput,
    make_tiles: MakeTiles,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[pytest.MonkeyPatch], None],
) -> None:
    fault(monkeypatch)
    engine, trace = _static(make_engine(max_num_sequences=2, tile_batch=1)), Trace()
    _beside(engine, TracedStream(trace, lambda: False))
    with trace:
        engine.generate([make_input(make_tiles(seed=seed)) for seed in range(4)], GREEDY)
        trace.check_freed()
    assert trace.races != []


def test_batches_are_numbered_and_waited_for_until_they_are_over() -> None:
    vision = VisionStream(stream := HandStream())
    for expected in (1, 2):
        with vision.batch() as number:
            assert number == expected
    with pytest.raises(torch.OutOfMemoryError), vision.batch():
        raise torch.OutOfMemoryError
    assert (vision.num_under_way, vision.num_over) == (3, 0)
    vision.receive(0, [])
    vision.receive(2, [])
    stream.num_done = 2
    assert (vision.num_under_way, vision.num_over) == (1, 2)
    vision.receive(2, [])
    vision.receive(3, [])
    assert stream.awaited == [2, 3]


def test_a_cpu_does_one_thing_at_a_time(make_engine: MakeEngine) -> None:
    assert make_engine().runner.vision is None


def test_tiles_encoded_before_memory_ended_are_waited_for(
    make_engine: MakeEngine, make_input: MakeInput, make_tiles: MakeTiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first image of a batch has its features, the second has not."""
    engine, trace = make_engine(tile_batch=16), Trace()
    _beside(engine, TracedStream(trace, lambda: False))
    stored: list[int] = []
    store = EncodedImage.store

    def failing(self: EncodedImage, start: int, features: torch.Tensor, batch: int = 0) -> None:
        stored.append(batch)
        if len(stored) == 2:
            raise torch.OutOfMemoryError
        store(self, start, features, batch)

    monkeypatch.setattr(EncodedImage, "store", failing)
    prompts = [make_input(make_tiles(1, 2, seed=seed)) for seed in (1, 2)]
    with trace:
        done = engine.generate(prompts, GREEDY)
    assert (stored, trace.races) == ([1, 1, 2], [])
    monkeypatch.undo()
    assert [each.token_ids for each in done] == [each.token_ids for each in make_engine().generate(prompts, GREEDY)]
