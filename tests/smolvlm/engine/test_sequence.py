from dataclasses import replace

import pytest

from smolvlm.engine.sequence import Completion, Sequence
from smolvlm.sampling import SamplingParams

EOS = frozenset({9})
LONG = SamplingParams(max_new_tokens=500)


def _sequence(params: SamplingParams = LONG) -> Sequence:
    return Sequence([1, 2, 3], [], params, priority=0, max_new_tokens=params.max_new_tokens)


def _feed(sequence: Sequence, tokens: list[int]) -> int:
    """Append until it is finished; how many were taken."""
    for count, token in enumerate(tokens, start=1):
        sequence.append(token, -1.0, EOS)
        if sequence.finish_reason is not None:
            return count
    return len(tokens)


def test_an_end_token_stops_and_is_part_of_the_answer() -> None:
    sequence = _sequence()
    assert _feed(sequence, [5, 6, 9, 7]) == 3
    assert sequence.completion() == Completion([5, 6, 9], "stop", 3, 3, -1.0)


def test_the_limit_stops() -> None:
    sequence = _sequence(SamplingParams(max_new_tokens=2))
    assert _feed(sequence, [5, 6, 7]) == 2
    assert sequence.finish_reason == "length"


def test_an_end_token_at_the_limit_counts_as_stop() -> None:
    sequence = _sequence(SamplingParams(max_new_tokens=2))
    _feed(sequence, [5, 9])
    assert sequence.finish_reason == "stop"


@pytest.mark.parametrize(("window", "taken"), [(192, 195), (30, 33)])
def test_a_loop_stops_once_it_fills_the_window(window: int, taken: int) -> None:
    sequence = _sequence(replace(LONG, repetition_window=window))
    assert _feed(sequence, [100, 101, 102] + [5, 6, 7, 8] * 100) == taken
    assert sequence.finish_reason == "repetition"


@pytest.mark.parametrize("params", [replace(LONG, repetition_window=None), replace(LONG, ignore_eos=True)])
def test_a_loop_may_be_let_run(params: SamplingParams) -> None:
    sequence = _sequence(params)
    assert _feed(sequence, [5] * 600) == 500
    assert sequence.finish_reason == "length"


def test_ignore_eos_passes_end_tokens() -> None:
    sequence = _sequence(SamplingParams(max_new_tokens=4, ignore_eos=True))
    assert _feed(sequence, [9, 9, 9, 9]) == 4


def test_higher_priority_comes_first_then_the_earlier() -> None:
    first, second = _sequence(), _sequence()
    urgent = Sequence([1], [], SamplingParams(), priority=5, max_new_tokens=1)
    assert sorted([second, urgent, first], key=lambda each: each.order) == [urgent, first, second]
