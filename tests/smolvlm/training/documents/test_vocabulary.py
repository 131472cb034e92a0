import pytest

from smolvlm.training.documents.vocabulary import (
    CHARACTERS,
    belongs,
    names,
    own,
    short_words,
    split_of_unit,
    units,
    words,
)


def test_units_are_long_words_and_long_tokens_with_digits() -> None:
    text = "The Quick-fix, (12:45) costs £1,234.50! A1-B2 99 a_tree"
    assert units(text) == ["quick", "costs", "tree", "12:45", "1,234.50", "a1-b2"]


@pytest.mark.parametrize("text", ["the 99 a-b £5", "", "123", "don't"])
def test_short_words_and_numbers_belong_to_both(text: str) -> None:
    assert belongs(text, "train")
    assert belongs(text, "held_out")


@pytest.mark.parametrize(("unit", "split"), [("total", "held_out"), ("street", "train"), ("12.50", "train")])
def test_the_side_of_a_unit_is_for_ever(unit: str, split: str) -> None:
    assert split_of_unit(unit) == split


def test_case_and_punctuation_do_not_change_the_side() -> None:
    for word in words("held_out")[:200]:
        assert belongs(f'"{word.upper()}!"', "held_out")
        assert not belongs(f"({word.capitalize()})", "train")


def test_words_and_names_of_the_splits_share_nothing() -> None:
    train, held_out = ({unit for word in words(split) for unit in units(word)} for split in ("train", "held_out"))
    assert not train & held_out
    assert 0.18 < len(held_out) / len(train | held_out) < 0.22
    for ours, theirs in zip(names("train"), names("held_out"), strict=True):
        assert not {unit for name in ours for unit in units(name)} & {unit for name in theirs for unit in units(name)}


def test_words_are_common_and_decent() -> None:
    assert {"about", "know", "they"} <= {*words("train")[:300], *words("held_out")[:100]}
    assert set(short_words()[:5]) == {"the", "you", "i", "to", "a"}
    assert not {"damn", "bastard", "bastards"} & {*words("train"), *words("held_out")}


def test_choices_are_those_of_the_split() -> None:
    choices = ("TOTAL", "SUM", "Balance", "AMOUNT DUE")
    assert set(own(choices, "train")) & set(own(choices, "held_out")) == {"SUM"}
    with pytest.raises(AssertionError, match="add a choice of short words"):
        own(("TOTAL",), "held_out" if split_of_unit("total") == "train" else "train")


def test_the_charset_has_all_of_ascii_and_some_more() -> None:
    assert {chr(code) for code in range(33, 127)} | set("£€°é") == set(CHARACTERS)
