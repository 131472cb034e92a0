"""How well texts were read: error rates of characters and words, exact matches, ANLS, with bootstrap intervals.

All of it is computed on (reference, prediction) pairs after `normalise`, which takes away what no reader of a page
would call an error: a space at a line's end, a second one between words, an empty line. Letter case, digits,
punctuation and the breaks between lines count. `raw_cer` and `raw_exact` are the same figures without it.
"""

import re
import unicodedata
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rapidfuzz.distance import Levenshtein

Pair = tuple[str, str]
"""What stands in the image, and what was read."""

ANLS_THRESHOLD = 0.5
RESAMPLES = 1000
_BREAKS = re.compile(r"\s*\n\s*")
_SPACES = re.compile(r"[^\S\n]+")


@dataclass(frozen=True)
class Interval:
    """A figure and the 95 % bootstrap interval around it, as shares (0.01 is one per cent)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Metrics:
    """Figures of one set of documents. `characters` and `words` are those of the references."""

    documents: int
    characters: int
    words: int
    cer: Interval
    wer: Interval
    exact: Interval
    anls: Interval
    raw_cer: float
    raw_exact: float


def normalise(text: str) -> str:
    """Return `text` in Unicode's composed form (NFC), without outer white space, empty lines and doubled spaces."""
    composed = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    return _SPACES.sub(" ", _BREAKS.sub("\n", composed.strip()))


def edits(reference: Sequence[Hashable], prediction: Sequence[Hashable]) -> int:
    """Return the Levenshtein distance: insertions, deletions and substitutions, one each."""
    return Levenshtein.distance(reference, prediction)


def character_error_rate(pair: Pair) -> float:
    """Return the edits of one normalised pair per reference character; above 1 where much was invented.

    Raises ValueError for a reference without characters.
    """
    reference, prediction = map(normalise, pair)
    return edits(reference, prediction) / _positive(len(reference))


def anls(pair: Pair, threshold: float = ANLS_THRESHOLD) -> float:
    """Return the normalised Levenshtein similarity of one normalised pair, 0 where the distance reaches the threshold.

    Source: Biten et al., https://arxiv.org/abs/1905.13648, equation 1, here with letter case kept: case was to be read.
    """
    reference, prediction = map(normalise, pair)
    distance = edits(reference, prediction) / max(len(reference), len(prediction), 1)
    return 1.0 - distance if distance < threshold else 0.0


def measure(pairs: Iterable[Pair], seed: int = 0) -> Metrics:
    """Return the figures of a set of documents.

    Rates are of the whole set: all edits over all reference characters (or words), so a long page weighs more than a
    word. Intervals come from 1000 resamples of the documents with numbers drawn from `seed`; of a set without a single
    error they are [0, 0], which says less than it seems to. Raises ValueError without a reference character.
    """
    pairs = list(pairs)
    counts = np.array([_counts(pair) for pair in pairs], np.float64).reshape(len(pairs), len(_COUNTS))
    total = counts.sum(axis=0)
    _positive(int(total[_COUNTS.index("characters")]))
    value, resampled = _figures(total[None])[0], _figures(_resampled_sums(counts, seed))
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    cer, wer, exact, mean_anls = (Interval(*map(float, each)) for each in zip(value, low, high, strict=True))
    sums = dict(zip(_COUNTS, total.tolist(), strict=True))
    return Metrics(
        documents=len(pairs),
        characters=int(sums["characters"]),
        words=int(sums["words"]),
        cer=cer,
        wer=wer,
        exact=exact,
        anls=mean_anls,
        raw_cer=sums["raw_character_edits"] / sums["raw_characters"],
        raw_exact=sums["raw_exact"] / len(pairs),
    )


_COUNTS = (
    "documents",
    "character_edits",
    "characters",
    "word_edits",
    "words",
    "exact",
    "anls",
    "raw_character_edits",
    "raw_characters",
    "raw_exact",
)


def _counts(pair: Pair) -> tuple[float, ...]:
    """What one document adds to the sums that all figures are quotients of, in the order of `_COUNTS`."""
    reference, prediction = map(normalise, pair)
    words, read_words = reference.split(), prediction.split()
    return (
        1,
        edits(reference, prediction),
        len(reference),
        edits(words, read_words),
        len(words),
        reference == prediction,
        anls(pair),
        edits(*pair),
        len(pair[0]),
        pair[0] == pair[1],
    )


def _resampled_sums(counts: npt.NDArray[np.float64], seed: int) -> npt.NDArray[np.float64]:
    """Sums [RESAMPLES, figures] over as many documents as there are, drawn with replacement."""
    random, size = np.random.default_rng(seed), len(counts)
    return np.stack([np.bincount(random.integers(0, size, size), minlength=size) @ counts for _ in range(RESAMPLES)])


def _figures(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """CER, WER, exact and ANLS [N, 4] of sums [N, figures]."""
    documents, edited, characters, edited_words, words, exact, similarity = sums.T[:7]
    return np.stack([edited / characters, edited_words / words, exact / documents, similarity / documents], axis=1)


def _positive(characters: int) -> int:
    if characters == 0:
        raise ValueError("the references hold no characters to read; leave documents without a text out")
    return characters
