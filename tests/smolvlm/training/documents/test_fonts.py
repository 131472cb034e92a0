from collections.abc import Iterator
from pathlib import Path

import pytest

from smolvlm.training.documents import fonts
from smolvlm.training.documents.options import Split
from smolvlm.training.documents.vocabulary import CHARACTERS


@pytest.fixture
def _packages_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(fonts, "SYSTEM_FONTS", tmp_path)
    _forget()
    yield
    _forget()


def _forget() -> None:
    for cached in (fonts.styles, fonts.relatives, fonts._installed):
        cached.cache_clear()


def test_no_family_is_in_both_splits() -> None:
    train, held_out = fonts.font_families("train"), fonts.font_families("held_out")
    assert train
    assert held_out
    assert not set(train) & set(held_out)
    files = [
        {style.path.stem for named in fonts.styles(split).values() for style in named}
        for split in ("train", "held_out")
    ]
    assert not files[0] & files[1]


@pytest.mark.usefixtures("_packages_alone")
def test_fonts_from_pypi_are_enough() -> None:
    assert {"DejaVu Sans", "DejaVu Sans Mono", "DejaVu Serif", "Roboto", "Source Sans Pro"} <= set(
        fonts.font_families("train")
    )
    assert fonts.font_families("held_out") == ("Hanken Grotesk", "Source Serif Pro")


@pytest.mark.usefixtures("_packages_alone")
def test_without_fonts_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "PACKAGES", ())
    with pytest.raises(ValueError, match=r"no font family of split train is installed; pip install .*\[train\]"):
        fonts.font_families("train")


@pytest.mark.parametrize(
    ("family", "split"),
    [
        ("Noto Serif", "held_out"),
        ("Noto Serif Display", "held_out"),
        ("Source Serif Pro", "held_out"),
        ("Source Sans Pro", "train"),
        ("Inter", "held_out"),
        ("Interstate", "train"),
        ("A family of next year", "train"),
    ],
)
def test_the_side_of_a_family_follows_from_its_name(family: str, split: str) -> None:
    assert fonts.split_of(family) == split


def test_relatives_are_all_families_in_groups() -> None:
    groups = fonts.relatives("train")
    assert tuple(family for group in groups for family in group) == fonts.font_families("train")
    assert ("DejaVu Sans", "DejaVu Sans Mono", "DejaVu Serif") in [
        tuple(family for family in group if "Math" not in family) for group in groups
    ]


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_style_draws_every_character_as_itself(split: Split) -> None:
    for named in fonts.styles(split).values():
        font = fonts.face(named[0].path, 40.0).font
        missing = bytes(font.getmask("\uffff"))
        shapes = {character: bytes(font.getmask(character)) for character in CHARACTERS}
        assert missing not in shapes.values(), named[0]
        assert all(any(shape) for shape in shapes.values()), named[0]
        assert shapes["0"] != shapes["O"] != shapes["o"], named[0]


def test_glyphs_are_measured_in_proportion_to_the_size() -> None:
    path = fonts.styles("train")["DejaVu Sans"][0].path
    face = fonts.face(path, 32.0)
    advance, box = face.glyph("g")
    assert advance == pytest.approx(face.font.getlength("g"), abs=0.6)
    assert box == pytest.approx(face.font.getbbox("g", anchor="ls"), abs=1.2)
    assert face.ascent >= -face.glyph("É")[1][1] * 0.8
    assert face.descent >= face.glyph("g")[1][3]
