import re
from random import Random

import pytest

from smolvlm.training.documents.content import TOTALS, Space, wrap, write
from smolvlm.training.documents.options import KINDS, Split
from smolvlm.training.documents.vocabulary import CHARACTERS, belongs, own, units
from smolvlm.training.documents.writer import UNITS, Writer

WIDE = Space(columns=28, rows=10, chars=240)


def text_of(kind: str, seed: int, split: Split, space: Space = WIDE) -> str:
    return "\n".join(row.text for row in write(kind, Writer(Random(seed), split), space).rows)


def test_no_unit_of_any_text_is_in_both_splits() -> None:
    seen: dict[Split, set[str]] = {"train": set(), "held_out": set()}
    for split, found in seen.items():
        for kind in KINDS:
            for seed in range(150):
                found.update(units(text_of(kind, seed, split)))
    assert not seen["train"] & seen["held_out"]
    assert min(map(len, seen.values())) > 700


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", [WIDE, Space(8, 2, 12), Space(1, 1, 4), Space(60, 1, 30)])
def test_texts_stay_within_their_space(kind: str, space: Space) -> None:
    for seed in range(60):
        lines = text_of(kind, seed, "held_out", space).split("\n")
        assert 1 <= len(lines) <= space.rows
        assert len("\n".join(lines)) <= space.chars
        for line in lines:
            assert line
            assert line == " ".join(line.split())
            assert len(line) <= space.columns
            assert set(line) <= {*CHARACTERS, " "}


@pytest.mark.parametrize("kind", KINDS)
def test_cells_stand_side_by_side(kind: str) -> None:
    for seed in range(60):
        for row in write(kind, Writer(Random(seed), "train"), WIDE).rows:
            ends = [0.0, *(cell.end for cell in row.cells)]
            assert all(end <= cell.start < cell.end <= 1 for end, cell in zip(ends, row.cells, strict=False))


@pytest.mark.parametrize("space", [WIDE, Space(22, 5, 90), Space(40, 14, 400)])
def test_what_a_receipt_adds_up_to_is_its_total(space: Space) -> None:
    for seed in range(60):
        rows = write("receipt", Writer(Random(seed), "train"), space).rows
        total = next(number for number, row in enumerate(rows) if row.is_heading and len(row.cells) == 2)
        values = [row.cells[-1].text.lstrip("$£€") for row in rows[: total + 1] if len(row.cells) == 2]
        prices = [float(value) for value in values if re.fullmatch(r"\d+\.\d\d", value)]
        assert sum(prices[:-1]) == pytest.approx(prices[-1]), rows


def test_training_reads_relatives_of_the_total_that_is_held_out() -> None:
    shown, hidden = own(TOTALS, "train"), own(TOTALS, "held_out")
    assert "TOTAL" in hidden
    assert "TOTAL" not in shown
    assert any(label.startswith("TOTAL") for label in shown)
    assert any(label.endswith("TOTAL") for label in shown)


def test_a_cell_of_a_table_holds_one_word_or_two() -> None:
    tables = [write("table", Writer(Random(seed), "train"), WIDE) for seed in range(60)]
    lengths = [len(cell.text.split(" ")) for table in tables for row in table.rows for cell in row.cells]
    assert set(lengths) == {1, 2}
    assert lengths.count(1) > 4 * lengths.count(2)


def test_receipts_and_signs_measure_with_units() -> None:
    for kind in ("receipt", "sign"):
        texts = "\n".join(text_of(kind, seed, "train") for seed in range(60))
        assert re.search(rf"[a-z] \d[\d.]* ({'|'.join(UNITS)})\b", texts, re.IGNORECASE), kind


def test_wrapping_keeps_order_and_leaves_out_what_is_too_long() -> None:
    lines = wrap(["one", "two", "extraordinarily", "three four", "five"], Space(9, 3, 100))
    assert lines == ["one two", "three", "four five"]
    assert wrap(["one", "two", "three"], Space(9, 1, 100)) == ["one two"]
    assert wrap(["one", "two", "three"], Space(9, 3, 7)) == ["one two"]
    assert wrap(["extraordinarily"], Space(9, 3, 7)) == []


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_labels_belong_to_the_split(split: Split) -> None:
    for kind in ("receipt", "form", "screenshot"):
        for seed in range(100):
            assert belongs(text_of(kind, seed, split), split)
