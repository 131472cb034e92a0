"""The built-in documents as labelled images, and as files on which others can measure: PNGs and `labels.jsonl`."""

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from PIL import Image

from pipeline.errors import ConfigError
from pipeline.labelled import LabelColumns, LabelledImage
from pipeline.storage import Location

if TYPE_CHECKING:
    from smolvlm.training.documents import DocumentOptions

Split = Literal["train", "held_out"]

LABELS = "labels.jsonl"
COLUMNS = LabelColumns(text="text", kind="kind", degraded="degraded")
"""What stands in `labels.jsonl`, for reading it as a labelled source."""


@dataclass(frozen=True)
class Drawn:
    """Labelled images in memory, to be read like a labelled source."""

    images: list[LabelledImage]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Sequence[int]) -> list[LabelledImage]:
        """Return the images at `indices`."""
        return [self.images[index] for index in indices]


def draw(split: str, seed: int, count: int, options: "DocumentOptions | None" = None) -> Iterator[LabelledImage]:
    """Yield documents as PNGs, the same ones for the same split, seed, options and installed fonts.

    Raises ConfigError if the split is unknown.
    """
    if split not in get_args(Split):
        raise ConfigError(f"split {split!r} is unknown; it must be one of {', '.join(get_args(Split))}")
    from smolvlm.training.documents import DocumentGenerator, DocumentOptions

    generator = DocumentGenerator(split, seed, options or DocumentOptions())  # type: ignore[arg-type]
    for index in range(count):
        document = generator.document(index)
        yield LabelledImage(f"{index:06}.png", _png(document.image), document.text, document.kind, document.degraded)


def write_documents(documents: Iterable[LabelledImage], output: Location) -> None:
    """Store every document under its name and, last, `labels.jsonl` with `uri`, `text`, `kind` and `degraded` of each.

    Raises ConfigError if there are labels already: pictures of two sets must not mix.
    """
    labels = output.child(LABELS)
    if labels.info() is not None:
        raise ConfigError(f"{labels.uri} is there already; name another folder, or remove that one")
    lines = []
    for document in documents:
        output.child(document.name).put(document.data)
        row = {"uri": document.name, "text": document.text, "kind": document.kind, "degraded": document.degraded}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    labels.put("".join(lines).encode())


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
