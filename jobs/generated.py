"""The built-in documents as labelled images, and as files on which others can measure: PNGs and `labels.jsonl`."""

import io
import json
from collections.abc import Sequence
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


class GeneratedDocuments:
    """A sequence of labelled images, drawn when asked for: the same ones for the same split, seed and fonts."""

    def __init__(self, split: str, seed: int, count: int, options: "DocumentOptions | None" = None) -> None:
        """Raises ConfigError if the split is unknown."""
        if split not in get_args(Split):
            raise ConfigError(f"split {split!r} is unknown; it must be one of {', '.join(get_args(Split))}")
        from smolvlm.training.documents import DocumentGenerator, DocumentOptions

        self._generator = DocumentGenerator(split, seed, options or DocumentOptions())  # type: ignore[arg-type]
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> LabelledImage:
        number = range(self._count)[index]
        document = self._generator.document(number)
        return LabelledImage(_name(number), _png(document.image), document.text, document.kind, document.degraded)

    def read(self, indices: Sequence[int]) -> list[LabelledImage]:
        """Draw several documents."""
        return [self[index] for index in indices]


def write_documents(documents: GeneratedDocuments, output: Location) -> None:
    """Store every document as a PNG and, last, `labels.jsonl` with `uri`, `text`, `kind` and `degraded` of each.

    Raises ConfigError if there are labels already: pictures of two sets must not mix.
    """
    labels = output.child(LABELS)
    if labels.info() is not None:
        raise ConfigError(f"{labels.uri} is there already; name another folder, or remove that one")
    lines = []
    for index in range(len(documents)):
        document = documents[index]
        output.child(document.name).put(document.data)
        row = {"uri": document.name, "text": document.text, "kind": document.kind, "degraded": document.degraded}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    labels.put("".join(lines).encode())


def _name(index: int) -> str:
    return f"{index:06}.png"


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
