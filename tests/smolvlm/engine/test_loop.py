import threading
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from functools import partial

import pytest
from fixture_types import MakeEngine, MakeInput, MakeTiles

from smolvlm import Engine, SamplingParams
from smolvlm.engine import Completion, EngineDied, EngineLoop, PromptTooLong
from smolvlm.engine.sequence import Sequence
from smolvlm.processor import ModelInput

GREEDY = SamplingParams(max_new_tokens=8, ignore_eos=True)
LONG = SamplingParams(max_new_tokens=1900, ignore_eos=True)


def _break(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The next step waits for the event and then fails."""
    ready = threading.Event()

    def failing() -> list[Sequence]:
        ready.wait(10)
        raise RuntimeError("device lost")

    monkeypatch.setattr(engine, "step", failing)
    return ready


def test_futures_hold_what_generate_gives(
    loop: EngineLoop, make_engine: MakeEngine, make_input: MakeInput, make_tiles: MakeTiles
) -> None:
    inputs = [make_input(make_tiles(seed=seed), text=f"Number {seed}?") for seed in range(10)]
    expected = [done.token_ids for done in make_engine().generate(inputs, GREEDY)]
    futures = [loop.submit(each, GREEDY) for each in inputs]
    assert [future.result(30).token_ids for future in futures] == expected


def test_many_threads_may_submit_thousands(loop: EngineLoop, make_input: MakeInput) -> None:
    question, params = make_input(text="Hi"), SamplingParams(max_new_tokens=1)
    with ThreadPoolExecutor(8) as pool:
        futures = list(pool.map(lambda _: loop.submit(question, params), range(2000)))
    assert {future.result(60).output_tokens for future in futures} == {1}


def test_an_input_is_refused_in_the_thread_that_submits_it(loop: EngineLoop, make_input: MakeInput) -> None:
    with pytest.raises(PromptTooLong):
        loop.submit(make_input(text="word " * 3000), GREEDY)


def test_an_idle_loop_sleeps_and_wakes_up(loop: EngineLoop, question: ModelInput) -> None:
    loop.submit(question, GREEDY).result(30)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1
    assert loop.submit(question, GREEDY).result(30).output_tokens == 8


def test_cancelling_a_future_aborts_its_sequence(loop: EngineLoop, question: ModelInput) -> None:
    futures = [loop.submit(question, LONG) for _ in range(6)]
    assert all(future.cancel() for future in futures[::2])
    assert wait(futures[::2], timeout=30).not_done == set()
    for future in futures[1::2]:
        future.cancel()
    assert loop.submit(question, GREEDY).result(30).output_tokens == 8


def test_a_failed_step_fails_every_future_and_every_later_submit(
    make_engine: MakeEngine, question: ModelInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(max_num_sequences=4)
    ready = _break(engine, monkeypatch)
    loop = EngineLoop(engine)
    futures = [loop.submit(question, GREEDY) for _ in range(6)]
    ready.set()
    for future in futures:
        error = future.exception(30)
        assert isinstance(error, EngineDied)
        assert str(error) == "the engine stopped: RuntimeError: device lost"
        assert isinstance(error.__cause__, RuntimeError)
    with pytest.raises(EngineDied, match="device lost"):
        loop.submit(question, GREEDY)
    loop.close()


def test_close_finishes_what_was_accepted(engine: Engine, question: ModelInput) -> None:
    loop = EngineLoop(engine)
    futures = [loop.submit(question, GREEDY) for _ in range(9)]
    loop.close()
    assert [future.result(0).output_tokens for future in futures] == [8] * 9
    loop.close()
    with pytest.raises(RuntimeError, match="closed"):
        loop.submit(question, GREEDY)


def test_close_may_cancel(engine: Engine, question: ModelInput) -> None:
    loop = EngineLoop(engine)
    futures = [loop.submit(question, LONG) for _ in range(9)]
    loop.close(cancel=True)
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(0)
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks


def test_an_error_in_the_body_drops_the_work(engine: Engine, question: ModelInput) -> None:
    futures: list[Future[Completion]] = []

    def body() -> None:
        with EngineLoop(engine) as loop:
            futures.append(loop.submit(question, LONG))
            raise KeyError("body")

    with pytest.raises(KeyError, match="body"):
        body()
    assert futures[0].cancelled()


def test_a_callback_may_submit_and_close(engine: Engine, question: ModelInput) -> None:
    """Callbacks run on the loop's own thread: they must not wait for it."""
    loop, second = EngineLoop(engine), Future[Future[Completion]]()

    def on_done(_: Future[Completion]) -> None:
        second.set_result(loop.submit(question, GREEDY))
        loop.close()

    loop.submit(question, GREEDY).add_done_callback(on_done)
    assert second.result(30).result(30).output_tokens == 8
    loop.close()


def test_higher_priority_overtakes(
    make_engine: MakeEngine, question: ModelInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, entered, gate = list[int](), threading.Event(), threading.Event()
    engine = make_engine(max_num_sequences=1)
    step = engine.step

    def held() -> list[Sequence]:
        entered.set()
        gate.wait(30)
        return step()

    monkeypatch.setattr(engine, "step", held)
    with EngineLoop(engine) as loop:
        loop.submit(question, GREEDY)
        entered.wait(30)  # the engine is at this one, so that the next three come to it together
        for priority in (0, 1, 2):
            loop.submit(question, GREEDY, priority).add_done_callback(partial(_note, order, priority))
        gate.set()
    assert order == [2, 1, 0]


def _note(order: list[int], priority: int, _: Future[Completion]) -> None:
    order.append(priority)
