import pytest
from fixture_types import MakeEngine, MakeInput

from smolvlm import SamplingParams
from smolvlm.engine import BATCH, ONLINE, ClassStats, EngineDied, EngineLoop
from smolvlm.engine.stats import snapshot
from smolvlm.processor import ModelInput

GREEDY = SamplingParams(max_new_tokens=8, ignore_eos=True)


@pytest.fixture
def question(make_input: MakeInput) -> ModelInput:
    return make_input(text="Good morning.")


def test_each_class_is_counted_where_it_is(make_engine: MakeEngine, question: ModelInput) -> None:
    engine = make_engine(max_num_sequences=2)
    for priority in (ONLINE, BATCH, BATCH, BATCH):
        engine.add(question, GREEDY, priority)
    engine.step()
    stats = snapshot(engine, alive=True, inbox=[engine.prepare(question, GREEDY)])
    assert (stats.online, stats.batch) == (ClassStats(0, 0, 1), ClassStats(2, 2, 0))
    assert (stats.max_num_sequences, stats.occupancy, stats.num_waiting) == (18, 1 / 18, 2)
    assert 0 < stats.used_blocks < stats.num_blocks


def test_counters_grow_and_nothing_stays_behind(make_engine: MakeEngine, question: ModelInput) -> None:
    engine = make_engine()
    engine.generate([question] * 4, GREEDY)
    with EngineLoop(engine) as loop:
        loop.submit(question, GREEDY, ONLINE).result(30)
    stats = loop.stats()
    assert (stats.online, stats.batch, stats.used_blocks) == (ClassStats(0, 0, 0), ClassStats(0, 0, 0), 0)
    assert (stats.generated_tokens, stats.prompt_tokens) == (5 * 8, 5 * len(question.prompt_token_ids))
    assert stats.steps >= 2 * 8


def test_a_broken_loop_is_not_alive(
    make_engine: MakeEngine, question: ModelInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    loop = EngineLoop(engine)
    assert (loop.is_alive, loop.stats().alive) == (True, True)
    monkeypatch.setattr(engine, "step", lambda: 1 / 0)
    with pytest.raises(EngineDied):
        loop.submit(question, GREEDY).result(30)
    assert (loop.is_alive, loop.stats().alive) == (False, False)
