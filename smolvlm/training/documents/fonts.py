"""Which font families there are, which split each belongs to, and how wide their glyphs are.

Nothing is bundled: fonts come from matplotlib (DejaVu), from PyPI's `font-*` packages and from the system's font
packages, whatever of them is installed. A family is taken if it holds the whole charset and its letters and figures
cannot be taken for each other.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path

from PIL import ImageFont

from smolvlm.training.documents.options import Split
from smolvlm.training.documents.vocabulary import CHARACTERS

PACKAGES = (
    "matplotlib", "font_roboto", "font_source_sans_pro", "font_source_serif_pro", "font_caladea", "font_manrope",
    "font_hanken_grotesk", "font_lato", "font_fredoka_one",
)  # fmt: skip
SYSTEM_FONTS = Path("/usr/share/fonts")
RAREST = "Az~|@`£€°é"  # a font that has these has the whole charset
MEASURED = 128.0  # font size in pixels
Rectangle = tuple[float, float, float, float]

# Families that training never sees, with their relatives: a design is on one side as a whole. A name stands for every
# family whose name begins with the same words (Noto: Noto Sans, Noto Serif Display).
HELD_OUT = (
    "Arapey", "C059", "Cabin", "Cantarell", "Clear Sans", "Courier Prime", "Droid", "EB Garamond", "Fira",
    "Gentium", "Gillius ADF", "Hanken Grotesk", "Inconsolata", "Inter", "JetBrains Mono", "Junicode", "Karla", "Noto",
    "Old Standard", "Open Sans", "PT", "Source Serif", "TeX Gyre Schola", "Tuffy", "Vollkorn",
)  # fmt: skip
UNREADABLE = (
    "Amatic", "CMU Classical Serif", "CMU Serif Upright Italic", "D050000L", "DejaVu Sans Display",
    "DejaVu Serif Display", "Last Resort", "Linux Biolinum Keyboard", "Linux Libertine Initials", "Romande ADF Script",
    "Standard Symbols", "STIXIntegrals", "Symbola", "TeX Gyre Chorus", "Z003",
)  # fmt: skip
UNREADABLE_STYLES = ["thin", "hairline", "extralight", "ultralight", "outline", "shadow", "swash", "caps"]
NAMES_OF_OTHER_SCRIPTS = ("noto", "lohit", "smc")
LATIN_NOTO = ("NotoSans-", "NotoSerif-", "NotoMono-", "NotoSansMono-", "NotoSansDisplay-", "NotoSerifDisplay-")


@dataclass(frozen=True)
class Style:
    """One font file: its family and style as the font itself names them."""

    family: str
    name: str
    path: Path

    @property
    def is_plain(self) -> bool:
        return self.name.lower() in ("regular", "book", "roman", "medium", "normal", "text")


@dataclass(frozen=True)
class Face:
    """A style at a size, with the measures that layout needs, in pixels."""

    path: Path
    font: ImageFont.FreeTypeFont
    size: float
    ascent: float
    descent: float

    def length(self, text: str) -> float:
        return _length(self.font, text)

    def glyph(self, character: str) -> tuple[float, Rectangle]:
        """Return the advance and the ink's box (x0, y0, x1, y1) from the origin on the baseline."""
        advance, box = _glyph(self.path, character)
        scale = self.size / MEASURED
        return advance * scale, (box[0] * scale, box[1] * scale, box[2] * scale, box[3] * scale)


@lru_cache(maxsize=2048)
def _length(font: ImageFont.FreeTypeFont, text: str) -> float:
    return font.getlength(text)


@lru_cache(maxsize=100_000)
def _glyph(path: Path, character: str) -> tuple[float, Rectangle]:
    """Measure a glyph at one large size for all: close to a pixel, and no size pays for its own measures."""
    font = _font(path, MEASURED)
    return font.getlength(character), font.getbbox(character, anchor="ls")


@lru_cache(maxsize=256)
def _font(path: Path, size: float) -> ImageFont.FreeTypeFont:
    """Open a font with the plain layout engine, so that no optional library matters."""
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def face(path: Path, size: float) -> Face:
    """Return the font file at a size in pixels."""
    ascent, descent = _heights(path)
    return Face(path, _font(path, size), size, ascent * size, descent * size)


@lru_cache(maxsize=2048)
def _heights(path: Path) -> tuple[float, float]:
    boxes = [_glyph(path, character)[1] for character in CHARACTERS]
    return max(-box[1] for box in boxes) / MEASURED, max(box[3] for box in boxes) / MEASURED


def split_of(family: str) -> Split:
    """Return the split of a family: held out if it is, or begins like, one of `HELD_OUT`."""
    return "held_out" if _begins_with_one_of(family, HELD_OUT) else "train"


def font_families(split: Split) -> tuple[str, ...]:
    """Return the names of the installed families that the split draws with, sorted."""
    return tuple(styles(split))


@cache
def styles(split: Split) -> dict[str, tuple[Style, ...]]:
    """Return family → its styles, sorted by name, so that it does not matter where the files lie.

    Raises:
        ValueError: no family of the split is installed.
    """
    families: dict[str, dict[str, Style]] = {}
    for style in _installed():
        if split_of(style.family) == split:
            families.setdefault(style.family, {}).setdefault(style.path.stem, style)
    if not families:
        raise ValueError(f"no font family of split {split} is installed; pip install 'smolvlm-pipeline[train]'")
    return {family: tuple(named[name] for name in sorted(named)) for family, named in sorted(families.items())}


@cache
def relatives(split: Split) -> tuple[tuple[str, ...], ...]:
    """Return the split's families in groups that share the first word of their names, hence mostly a design."""
    grouped = groupby(font_families(split), key=lambda family: family.split()[0])
    return tuple(tuple(families) for _, families in grouped)


@cache
def _installed() -> tuple[Style, ...]:
    return tuple(style for path in _files() if (style := _readable(path)))


def _files() -> list[Path]:
    specs = [importlib.util.find_spec(package) for package in PACKAGES]
    roots = [Path(folder) for spec in specs if spec for folder in spec.submodule_search_locations or ()]
    files = [path for root in [*roots, SYSTEM_FONTS] for path in sorted(root.rglob("*.[ot]tf"))]
    return [path for path in files if not _is_of_another_script(path)]


def _is_of_another_script(path: Path) -> bool:
    return path.name.lower().startswith(NAMES_OF_OTHER_SCRIPTS) and not path.name.startswith(LATIN_NOTO)


def _readable(path: Path) -> Style | None:
    font = ImageFont.truetype(path, 48, layout_engine=ImageFont.Layout.BASIC)
    family, name = font.getname()
    if not family or not name or _begins_with_one_of(family, UNREADABLE):
        return None
    if any(word in f"{family}{name}".lower().replace(" ", "") for word in UNREADABLE_STYLES):
        return None
    return Style(family, name, path) if _is_legible(font) else None


def _is_legible(font: ImageFont.FreeTypeFont) -> bool:
    """Whether the charset is there, small letters are not small capitals, and 0 is not the size of o."""
    missing = _ink(font, "\uffff")
    drawn = [_ink(font, character) for character in RAREST]
    has_descender = font.getbbox("p", anchor="ls")[3] > font.size / 10
    return (
        missing not in drawn and b"" not in drawn and has_descender and _height(font, "0") > 1.15 * _height(font, "o")
    )


def _height(font: ImageFont.FreeTypeFont, character: str) -> float:
    _, top, _, bottom = font.getbbox(character, anchor="ls")
    return bottom - top


def _ink(font: ImageFont.FreeTypeFont, character: str) -> bytes:
    mask = font.getmask(character)
    return bytes(mask) + bytes(mask.size) if max(mask.size) else b""


def _begins_with_one_of(family: str, names: tuple[str, ...]) -> bool:
    return any(family == name or family.startswith(name + " ") for name in names)
