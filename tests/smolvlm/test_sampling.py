from typing import Any

import pytest
import torch

from smolvlm.sampling import SamplingParams, SamplingTensors, choose_tokens, draw, is_repeating, top_logprobs

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, r"top_p is 0\.0; it must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"repetition_window": 2}, "repetition_window is 2; it must be at least 3"),
        ({"top_logprobs": -1}, "top_logprobs is -1; it must be between 0 and 20"),
        ({"top_logprobs": 21}, "top_logprobs is 21; it must be between 0 and 20"),
    ],
)
def test_values_out_of_range_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**arguments)


def test_greedy_takes_the_likeliest_and_its_log_probability() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, -1.0, 0.0]])
    tokens, logprobs = choose_tokens(logits, None, None)
    assert tokens.tolist() == [1, 0]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[[0, 1], [1, 0]])


def test_log_probabilities_are_those_before_temperature_and_top_p() -> None:
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(0))
    sampling = SamplingTensors.of([SamplingParams(temperature=3.0, top_p=0.5)], CPU)
    tokens, logprobs = choose_tokens(logits, sampling, torch.tensor([[0.7]]))
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[0, tokens])


def test_top_log_probabilities_are_the_largest_of_the_rows_that_ask() -> None:
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    top = top_logprobs(logits, [0, 5, 20, 1])
    for row, count in zip([1, 2, 3], [5, 20, 1], strict=True):
        expected = sorted(enumerate(logits[row].log_softmax(-1).tolist()), key=lambda pair: -pair[1])[:count]
        assert [token for token, _ in top[row]] == [token for token, _ in expected]
        assert [value for _, value in top[row]] == pytest.approx([value for _, value in expected], abs=1e-6)
    assert top[0] == ()


def test_a_vocabulary_smaller_than_what_is_asked_gives_all_it_has() -> None:
    assert [token for token, _ in top_logprobs(torch.tensor([[0.0, 2.0, 1.0]]), [20])[0]] == [1, 2, 0]


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.1, 0.5, 0.15, 0.25])
    uniform = (torch.arange(1000) / 1000).unsqueeze(1)
    tokens = draw(probabilities.log().expand(1000, 4), torch.ones(1000, 1), uniform)
    counts = torch.bincount(tokens.squeeze(1), minlength=4)
    assert (counts - 1000 * probabilities).abs().max() <= 2


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log().expand(101, 4)
    uniform = torch.linspace(0, 0.9999999, 101).unsqueeze(1)
    for top_p, kept in [(0.01, {1}), (0.45, {1}), (0.6, {1, 3}), (0.8, {1, 3, 2}), (0.95, {0, 1, 2, 3})]:
        assert set(draw(logits, torch.full((101, 1), top_p), uniform).flatten().tolist()) == kept


def test_greedy_rows_stay_greedy_beside_drawn_ones() -> None:
    params = [SamplingParams(temperature=temperature) for temperature in (0.0, 1e-30, 1.0, 1.0)]
    logits = torch.tensor([0.4, 0.6]).log().expand(4, 2)
    sampling = SamplingTensors.of(params, CPU)
    assert choose_tokens(logits, sampling, torch.tensor([[0.9], [0.9], [0.1], [0.9]]))[0].tolist() == [1, 1, 1, 0]
    assert SamplingTensors.of(params[:2], CPU) is None


@pytest.mark.parametrize("period", [1, 2, 7, 64])
def test_a_cycle_is_found_once_it_fills_the_window(period: int) -> None:
    cycle = list(range(period))
    tokens = [1000, 1001, *(cycle * 200)[:192]]
    assert is_repeating(tokens, 192)
    assert not is_repeating(tokens[:-1], 192)


def test_what_is_no_cycle_goes_on() -> None:
    assert not is_repeating((list(range(65)) * 3)[:192], 192)  # fewer than three times over
    assert not is_repeating([7] * 150 + list(range(42)), 192)  # a long rule, then text
    assert not is_repeating([*range(91), 500, *range(91)] + [501] * 9, 192)
    rows = [token for row in range(48) for token in (11, 12, 13, 100 + row)]  # a table whose cells differ
    assert not is_repeating(rows, 192)
