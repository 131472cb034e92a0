"""Labelled documents → what the engine reads in them."""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pipeline.errors import ConfigError, RowError
from pipeline.labelled import LabelledImage

if TYPE_CHECKING:
    from smolvlm.engine.sequence import Completion

_AHEAD = 48  # documents prepared or being read at a time: more than the engine's batch, so that it stays full
_READ_AT_ONCE = 16


class Documents(Protocol):
    """A labelled source or the built-in documents."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> Sequence[LabelledImage | RowError]:
        """Return the images at `indices`, or why there are none."""


@dataclass(frozen=True)
class Settings:
    """What reads, and how."""

    model: str
    revision: str | None = None
    dtype: str = "auto"
    quantization: str | None = None
    device: str = "cpu"
    prompt: str = "Transcribe all text."
    max_new_tokens: int = 1024


@dataclass(frozen=True)
class Reading:
    """One document and what the model read in it."""

    index: int
    name: str
    kind: str
    degraded: bool | None
    reference: str
    prediction: str
    finish_reason: str
    output_tokens: int
    mean_logprob: float


@dataclass(frozen=True)
class Evaluation:
    """All documents of a run: readings and, for those that could not be read, errors. `digest` is of what was read:
    SHA-256 of image bytes and texts, in order. `seconds` are those of reading files, preparing and answering; the
    model is loaded before."""

    readings: list[Reading]
    errors: list[RowError]
    digest: str
    seconds: float


OnProgress = Callable[[int, int], None]
"""Gets the number of documents done, and of those among them that are errors."""


def read_documents(documents: Documents, count: int, settings: Settings, on_progress: OnProgress) -> Evaluation:
    """Read the first `count` documents. Raises ConfigError: the model cannot be loaded, or nothing could be read."""
    with _Reader(settings) as reader:
        start = time.perf_counter()
        digest = hashlib.sha256()
        readings: list[Reading] = []
        errors: list[RowError] = []
        for outcome in reader.read(_images(documents, count, digest.update)):
            (readings if isinstance(outcome, Reading) else errors).append(outcome)  # type: ignore[arg-type]
            on_progress(len(readings) + len(errors), len(errors))
        seconds = time.perf_counter() - start
    if not readings:
        raise ConfigError(f"none of {count} documents could be read; the first error: {errors[0].message}")
    return Evaluation(readings, errors, digest.hexdigest(), seconds)


class _Reader:
    """Processor and engine of a checkpoint, reading images as they come and answering in their order."""

    def __init__(self, settings: Settings) -> None:
        import torch

        from smolvlm import Engine, Processor, SamplingParams
        from smolvlm.engine import EngineLoop

        if settings.device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(f"device {settings.device}: PyTorch finds no CUDA device here; use cpu")
        try:
            self._params = SamplingParams(max_new_tokens=settings.max_new_tokens)
            self._processor = Processor.from_pretrained(settings.model, settings.revision)
            place, numbers = (settings.device, settings.dtype), settings.quantization
            engine = Engine.from_pretrained(settings.model, *place, settings.revision, quantization=numbers)
        except (OSError, ValueError) as error:
            raise ConfigError(f"model {settings.model}: {error}") from error
        content = [{"type": "image"}, {"type": "text", "text": settings.prompt}]
        self._messages = [{"role": "user", "content": content}]
        self._loop = EngineLoop(engine)

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._loop.close(cancel=kind is not None)

    def read(self, images: Iterable[tuple[int, LabelledImage | RowError]]) -> Iterator[Reading | RowError]:
        waiting: deque[tuple[int, LabelledImage, Future[Completion]] | RowError] = deque()
        for index, image in images:
            waiting.append(self._submit(index, image))
            if len(waiting) > _AHEAD:
                yield self._finish(waiting.popleft())
        while waiting:
            yield self._finish(waiting.popleft())

    def _submit(
        self, index: int, image: LabelledImage | RowError
    ) -> "tuple[int, LabelledImage, Future[Completion]] | RowError":
        from smolvlm.engine import PromptTooLong
        from smolvlm.image import ImageError, decode_image

        if isinstance(image, RowError):
            return image
        try:
            model_input = self._processor(self._messages, [decode_image(image.data).image])
            return index, image, self._loop.submit(model_input, self._params)
        except ImageError as error:
            return RowError(error.code, "prepare", f"row {index} ({image.name}): {error}")
        except PromptTooLong as error:
            return RowError("prompt_too_long", "generate", f"row {index} ({image.name}): {error}")

    def _finish(self, waiting: "tuple[int, LabelledImage, Future[Completion]] | RowError") -> Reading | RowError:
        if isinstance(waiting, RowError):
            return waiting
        index, image, future = waiting
        done = future.result()
        return Reading(
            index=index,
            name=image.name,
            kind=image.kind,
            degraded=image.degraded,
            reference=image.text,
            prediction=self._processor.decode(done.token_ids).strip(),  # as the pipeline writes it
            finish_reason=done.finish_reason,
            output_tokens=done.output_tokens,
            mean_logprob=round(done.mean_logprob, 4),
        )


def _images(
    documents: Documents, count: int, note: Callable[[bytes], None]
) -> Iterator[tuple[int, LabelledImage | RowError]]:
    """Yield documents with their index, a few read at a time, and note the bytes of each."""
    for start in range(0, count, _READ_AT_ONCE):
        indices = range(start, min(start + _READ_AT_ONCE, count))
        for index, image in zip(indices, documents.read(indices), strict=True):
            if isinstance(image, LabelledImage):
                note(hashlib.sha256(image.data).digest() + hashlib.sha256(image.text.encode()).digest())
            yield index, image
