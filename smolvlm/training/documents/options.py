"""What is drawn, and how hard it is to read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Split = Literal["train", "held_out"]
KINDS = ("word", "line", "paragraph", "receipt", "form", "table", "sign", "screenshot", "dense")
EVERYDAY = {kind: 1.0 for kind in KINDS if kind != "dense"}
FITS_ANYWHERE = 10  # a word of text a tenth of the longest edge high fits a page of any shape


@dataclass(frozen=True)
class DocumentOptions:
    """The mixture of documents that a generator draws.

    kinds: weight of every kind that may be drawn (see `KINDS`).
    longest_edge: bounds of the longer edge of the image in pixels.
    text_px: bounds of the font size in pixels, as they are once the longest edge has been scaled to `reference_edge`.
    degraded_share: share of documents that are made hard to read, 0 to 1.
    max_chars, max_lines: bounds of a document's text.

    Raises:
        ValueError: a value is out of range; the message names it and what to write instead.
    """

    kinds: Mapping[str, float] = field(default_factory=lambda: dict(EVERYDAY))
    longest_edge: tuple[int, int] = (256, 512)
    text_px: tuple[float, float] = (12.0, 36.0)
    reference_edge: int = 256
    degraded_share: float = 0.2
    max_chars: int = 240
    max_lines: int = 12

    def __post_init__(self) -> None:
        unknown = sorted(set(self.kinds) - set(KINDS))
        _require(not unknown, "kinds", unknown, f"chosen from {', '.join(KINDS)}")
        weights = dict(self.kinds)
        _require(min(weights.values(), default=0.0) >= 0.0, "kinds", weights, "a mapping of kinds to weights from 0 up")
        _require(0.0 < sum(weights.values()) < float("inf"), "kinds", weights, "of finite weights, one of them above 0")
        _require(self.reference_edge >= 64, "reference_edge", self.reference_edge, "at least 64 pixels")
        low, high = self.longest_edge
        _require(
            64 <= low <= high <= 4096, "longest_edge", self.longest_edge, "(low, high) with 64 <= low <= high <= 4096"
        )
        most = self.reference_edge / FITS_ANYWHERE
        small, large = self.text_px
        _require(6 <= small <= min(large, most), "text_px", self.text_px, f"(low, high) with 6 <= low <= {most:g}")
        _require(
            small <= large <= self.reference_edge / 4, "text_px", self.text_px, "at most a quarter of reference_edge"
        )
        _require(0.0 <= self.degraded_share <= 1.0, "degraded_share", self.degraded_share, "a share from 0 to 1")
        _require(self.max_chars >= 4, "max_chars", self.max_chars, "at least 4")
        _require(self.max_lines >= 1, "max_lines", self.max_lines, "at least 1")


def _require(condition: bool, name: str, value: object, remedy: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value}; it must be {remedy}")
