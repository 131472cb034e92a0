from random import Random

import pytest

from smolvlm.training.documents.options import Split
from smolvlm.training.documents.vocabulary import CHARACTERS, belongs
from smolvlm.training.documents.writer import Writer

DRAWS = [
    "word", "cased", "name", "number", "price", "money", "date", "time", "code", "phone", "email", "url", "token",
    "noise", "quoted", "quantity",
]  # fmt: skip


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("draw", DRAWS)
def test_whatever_is_drawn_belongs_to_the_split_and_can_be_drawn(draw: str, split: Split) -> None:
    writer = Writer(Random(0), split)
    for _ in range(100):
        text = getattr(writer, draw)()
        assert belongs(text, split), text
        assert set(text) <= {*CHARACTERS, " "}
        assert text == text.strip()
        assert "  " not in text


def test_sentences_begin_with_a_capital_and_end_with_a_mark() -> None:
    writer = Writer(Random(1), "train")
    for _ in range(100):
        text = " ".join(writer.sentence())
        assert not text[0].islower()
        assert text[-1] in ".!?"


@pytest.mark.parametrize("longest", [1, 2, 3, 5, 9])
def test_words_are_as_short_as_asked(longest: int) -> None:
    writer = Writer(Random(2), "held_out")
    assert max(len(writer.word(longest)) for _ in range(300)) == longest


def test_short_words_are_as_frequent_in_both_splits() -> None:
    assert _share_of_short_words("train") == pytest.approx(_share_of_short_words("held_out"), abs=0.04)


def _share_of_short_words(split: Split) -> float:
    writer = Writer(Random(3), split)
    return sum(len(writer.word()) < 4 for _ in range(3000)) / 3000
