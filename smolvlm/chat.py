"""A conversation about pictures: what has been shown, asked and answered, and the prompt that the next question makes.

Two habits of small models shape the prompt. A long answer pulls later ones after it, so only the last few stay. Many
tiles make the model see a collage, so their number can be capped.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from smolvlm.image import decode_image

DEFAULT_HISTORY = 2
PLACE = re.compile(r"\{(\d+)\}")


class UnknownPicture(ValueError):
    """A question places a picture that was never shown."""


@dataclass(frozen=True, eq=False)
class Picture:
    """An image file that was shown. Each is itself alone: the same file shown twice makes two."""

    name: str
    data: bytes
    image: Image.Image

    @classmethod
    def from_bytes(cls, name: str, data: bytes) -> "Picture":
        """Decode a file's bytes. Raises smolvlm.image.ImageError."""
        return cls(name, data, decode_image(data).image)


Part = str | Picture


@dataclass(frozen=True)
class Exchange:
    """A question, its pictures in their places, and what was answered."""

    question: tuple[Part, ...]
    answer: str


@dataclass(frozen=True)
class Prompt:
    """What a model is asked: messages as `Processor` takes them, the pictures that fill their image entries in order,
    and the most tiles one picture may make (the whole picture is one of them; None: as the model likes)."""

    messages: list[dict[str, Any]]
    pictures: list[Picture]
    max_tiles: int | None


class Conversation:
    """Turns of one conversation. A picture belongs to the next question; once answered, it stays in sight.

    history: how many past answers stay in the prompt, with their questions. Pictures of older questions move to the
    front of what is left. max_tiles: the most tiles one picture may make, None for no cap; both may be changed any
    time. Raises ValueError for a value out of range.
    """

    def __init__(self, history: int = DEFAULT_HISTORY, max_tiles: int | None = None) -> None:
        self.pictures: list[Picture] = []
        self.exchanges: list[Exchange] = []
        self.history = history
        self.max_tiles = max_tiles
        self._waiting: list[Picture] = []

    @property
    def history(self) -> int:
        return self._history

    @history.setter
    def history(self, count: int) -> None:
        if count < 0:
            raise ValueError(f"history {count} must be at least 0: how many past answers stay in the prompt")
        self._history = count

    @property
    def max_tiles(self) -> int | None:
        return self._max_tiles

    @max_tiles.setter
    def max_tiles(self, count: int | None) -> None:
        if count is not None and count < 1:
            raise ValueError(f"tiles {count} must be at least 1: the whole picture is a tile of its own")
        self._max_tiles = count

    @property
    def waiting(self) -> list[Picture]:
        """Pictures shown since the last answer."""
        return list(self._waiting)

    def show(self, picture: Picture) -> None:
        """Add a picture to the next question; `{N}` in a question places picture N, counted from 1."""
        self.pictures.append(picture)
        self._waiting.append(picture)

    def prompt(self, question: str) -> Prompt:
        """What to ask a model. Changes nothing. Raises UnknownPicture for `{N}` where no picture has that number."""
        kept = self.exchanges[-self.history :] if self.history else []
        turns = [*((each.question, each.answer) for each in kept), (self._parts(question), None)]
        first, answer = turns[0]
        turns[0] = (*self._out_of_sight(turns, len(self.exchanges) - len(kept)), *first), answer
        pictures = [part for parts, _ in turns for part in parts if isinstance(part, Picture)]
        return Prompt([message for turn in turns for message in _messages(*turn)], pictures, self.max_tiles)

    def keep(self, question: str, answer: str) -> None:
        """Take note of an answer; the pictures that waited belong to its question."""
        self.exchanges.append(Exchange(self._parts(question), answer))
        self._waiting.clear()

    def reset(self) -> None:
        """Forget pictures, questions and answers; the settings stay."""
        self.pictures.clear()
        self.exchanges.clear()
        self._waiting.clear()

    def _parts(self, question: str) -> tuple[Part, ...]:
        """Pictures where the question places them; those that wait and have no place go first, as in training."""
        pieces = PLACE.split(question)
        parts: list[Part] = [self._numbered(int(piece)) if place % 2 else piece for place, piece in enumerate(pieces)]
        first = [picture for picture in self._waiting if picture not in parts]
        return (*first, *(part for part in parts if part != ""))

    def _numbered(self, number: int) -> Picture:
        if not 1 <= number <= len(self.pictures):
            raise UnknownPicture(f"there is no picture {{{number}}}; {len(self.pictures)} have been shown")
        return self.pictures[number - 1]

    def _out_of_sight(self, turns: Iterable[tuple[tuple[Part, ...], Any]], num_dropped: int) -> list[Picture]:
        """Pictures of the questions that are dropped, each once, unless a later question shows it again."""
        dropped = [part for each in self.exchanges[:num_dropped] for part in each.question if isinstance(part, Picture)]
        shown = [part for parts, _ in turns for part in parts]
        return [picture for picture in dict.fromkeys(dropped) if picture not in shown]


def _messages(question: tuple[Part, ...], answer: str | None) -> list[dict[str, Any]]:
    entries = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in question]
    asked = {"role": "user", "content": entries}
    return [asked] if answer is None else [asked, {"role": "assistant", "content": answer}]
