"""Metrics against hand-computed cases, a naive Levenshtein distance, and the properties that a rate has to have."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolvlm.training.metrics import Metrics, anls, character_error_rate, edits, measure, normalise

SHORT = st.text("ab \nÄ", max_size=7)
WITH_CONTENT = st.text("abc \nß", max_size=9).filter(lambda text: bool(text.strip()))
PAIRS = st.lists(st.tuples(WITH_CONTENT, SHORT), min_size=1, max_size=6)


def naive_distance(left: Sequence[object], right: Sequence[object]) -> int:
    """The recurrence as Wagner and Fischer wrote it down."""
    if not left or not right:
        return len(left) + len(right)
    return min(
        naive_distance(left[1:], right) + 1,
        naive_distance(left, right[1:]) + 1,
        naive_distance(left[1:], right[1:]) + (left[0] != right[0]),
    )


class TestNormalise:
    """What counts as no error."""

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            (" Total  4.20 \n\n\n EUR\t5\n", "Total 4.20\nEUR 5"),
            ("a\r\nb\rc", "a\nb\nc"),
            ("a\u00a0b", "a b"),  # a no-break space looks like a space
            ("e\u0301", "\u00e9"),
            ("Case, kept!", "Case, kept!"),
            ("", ""),
        ],
    )
    def test_cases(self, text: str, expected: str) -> None:
        assert normalise(text) == expected

    @given(st.text(max_size=30))
    def test_it_is_idempotent(self, text: str) -> None:
        assert normalise(normalise(text)) == normalise(text)


class TestOnePair:
    """Edits, character error rate and ANLS of a single document."""

    @settings(max_examples=60)
    @given(SHORT, SHORT)
    def test_edits_agree_with_the_naive_distance(self, left: str, right: str) -> None:
        assert edits(left, right) == naive_distance(left, right)

    @settings(max_examples=40)
    @given(st.lists(st.sampled_from(["one", "two", "three"]), max_size=5), st.lists(st.just("two"), max_size=5))
    def test_edits_of_words_agree_too(self, left: list[str], right: list[str]) -> None:
        assert edits(left, right) == naive_distance(left, right)

    def test_hand_computed(self) -> None:
        assert character_error_rate(("kitten", "sitting")) == 3 / 6
        assert character_error_rate(("ab", "xxxxxxxx")) == 4.0
        assert anls(("kitten", "sitting")) == pytest.approx(1 - 3 / 7)
        assert anls(("abcd", "abxy")) == 0.0  # a distance of one half is already too far
        assert anls(("abcde", "abcxy")) == pytest.approx(3 / 5)

    @given(WITH_CONTENT, SHORT)
    def test_bounds_and_zero_only_if_equal(self, reference: str, prediction: str) -> None:
        rate = character_error_rate((reference, prediction))
        left, right = normalise(reference), normalise(prediction)
        assert abs(len(left) - len(right)) / len(left) <= rate <= max(len(left), len(right)) / len(left)
        assert (rate == 0) == (left == right)
        assert 0 <= anls((reference, prediction)) <= 1
        assert (anls((reference, prediction)) == 1) == (left == right)

    def test_nothing_to_read_is_refused(self) -> None:
        with pytest.raises(ValueError, match="no characters to read"):
            character_error_rate((" \n", "a"))


class TestASet:
    """Figures of many documents."""

    def test_hand_computed(self) -> None:
        figures = measure([("kitten sat", "sitting sat"), ("ab", "ab"), ("Total  4.20 ", "Total 4.20"), ("x", "y")])
        assert (figures.documents, figures.characters, figures.words) == (4, 10 + 2 + 10 + 1, 2 + 1 + 2 + 1)
        assert figures.cer.value == pytest.approx((3 + 0 + 0 + 1) / 23)
        assert figures.wer.value == pytest.approx((1 + 0 + 0 + 1) / 6)
        assert figures.exact.value == 2 / 4
        assert figures.anls.value == pytest.approx(((1 - 3 / 11) + 1 + 1 + 0) / 4)
        assert figures.raw_cer == pytest.approx((3 + 0 + 2 + 1) / (10 + 2 + 12 + 1))
        assert figures.raw_exact == 1 / 4

    @settings(max_examples=30, deadline=None)
    @given(PAIRS)
    def test_the_rate_is_that_of_all_edits_and_lies_in_its_interval(self, pairs: list[tuple[str, str]]) -> None:
        figures = measure(pairs)
        lengths = [len(normalise(reference)) for reference, _ in pairs]
        rates = [character_error_rate(pair) for pair in pairs]
        assert figures.cer.value == pytest.approx(np.dot(rates, lengths) / sum(lengths))
        assert min(rates) - 1e-9 <= figures.cer.low <= figures.cer.high <= max(rates) + 1e-9
        assert (figures.cer.value == 0) == (figures.exact.value == 1) == (figures.wer.value == 0 == max(rates))

    def test_the_interval_is_the_binomial_one_for_exact_matches(self) -> None:
        """A share of yes and no has a standard error that is known: the bootstrap must find it."""
        pairs = [("a", "a")] * 300 + [("a", "b")] * 100
        exact = measure(pairs).exact
        half_width = 1.96 * (0.75 * 0.25 / 400) ** 0.5
        assert (exact.low, exact.high) == pytest.approx((0.75 - half_width, 0.75 + half_width), abs=0.006)

    def test_the_interval_follows_the_seed_alone(self) -> None:
        pairs = [("abcdef"[: n % 6 + 1], "abc") for n in range(40)]
        assert measure(pairs, seed=3) == measure(iter(pairs), seed=3)
        assert measure(pairs, seed=3).cer != measure(pairs, seed=4).cer

    def test_an_interval_narrows_with_more_documents(self) -> None:
        def width(figures: Metrics) -> float:
            return figures.cer.high - figures.cer.low

        pairs = [("abcd", "abcd"), ("abcd", "abxd"), ("abcd", "")]
        assert width(measure(pairs * 100)) < 0.3 * width(measure(pairs * 4))

    @pytest.mark.parametrize("pairs", [[], [("", "a"), (" ", "")]])
    def test_nothing_to_read_is_refused(self, pairs: list[tuple[str, str]]) -> None:
        with pytest.raises(ValueError, match="no characters to read"):
            measure(pairs)
