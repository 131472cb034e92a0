"""Which words, numbers and codes belong to which split, and the lists they are drawn from."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import string
from functools import cache
from importlib.resources import files

from smolvlm.training.documents.options import Split

PUNCTUATION = string.punctuation + "£€°"
CHARACTERS = "".join(sorted(set(string.printable) - set(string.whitespace))) + "£€°é"
HELD_OUT_SHARE = 5  # one unit in five is held out
WORDS = 30_000
LETTERS = re.compile(r"[^\W\d_]+")
DRAWABLE = re.compile(r"[a-zé]+(?:'[a-z]{1,2})?")
SHORTEST_UNIT = 4


def units(text: str) -> list[str]:
    """Return what must not occur in both splits: words of four or more letters, numbers and codes of four or more
    characters, without the punctuation around them and in lower case."""
    words = [word for word in LETTERS.findall(text.lower()) if len(word) >= SHORTEST_UNIT]
    tokens = [token.strip(PUNCTUATION) for token in text.lower().split()]
    return words + [t for t in tokens if len(t) >= SHORTEST_UNIT and any(c.isdigit() for c in t)]


def belongs(text: str, split: Split) -> bool:
    """Whether every unit of the text belongs to the split; shorter words belong to both."""
    return all(split_of_unit(unit) == split for unit in units(text))


def split_of_unit(unit: str) -> Split:
    """Return the side of a unit, which no version of a word list or of Python changes."""
    number = int.from_bytes(hashlib.sha256(unit.encode()).digest()[:8], "big")
    return "held_out" if number % HELD_OUT_SHARE == 0 else "train"


@cache
def words(split: Split) -> tuple[str, ...]:
    """Return the split's share of the common English words of four or more letters, the commonest first."""
    return tuple(word for word in _common() if units(word) and belongs(word, split))


@cache
def short_words() -> tuple[str, ...]:
    """Return the words too short to be on one side only, the commonest first."""
    return tuple(word for word in _common() if not units(word))


@cache
def _common() -> tuple[str, ...]:
    """Return the common words of pyspellchecker's list that better-profanity has nothing against."""
    packed = files("spellchecker").joinpath("resources/en.json.gz").read_bytes()
    counts: dict[str, int] = json.loads(gzip.decompress(packed))
    common = sorted(counts, key=lambda word: (-counts[word], word))[:WORDS]
    rude = frozenset(files("better_profanity").joinpath("profanity_wordlist.txt").read_text().split())
    stems = tuple(sorted(word for word in rude if len(word) > SHORTEST_UNIT))
    decent = [word for word in common if not {word, word.split("'")[0]} & rude and not word.startswith(stems)]
    return tuple(word for word in decent if DRAWABLE.fullmatch(word))


@cache
def names(split: Split) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the split's first names and surnames (Faker's en_US lists)."""
    from faker.providers.person.en_US import Provider

    first, last = sorted(Provider.first_names), sorted(Provider.last_names)
    return tuple(n for n in first if belongs(n, split)), tuple(n for n in last if belongs(n, split))


@cache
def own(choices: tuple[str, ...], split: Split) -> tuple[str, ...]:
    """Return those of the choices that belong to the split; at least one has to."""
    kept = tuple(choice for choice in choices if belongs(choice, split))
    assert kept, f"none of {choices} belongs to {split}; add a choice of short words"
    return kept
