"""The sampled images, read and decoded as a run does it: what they are, and what preparing them takes."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from jobs.plan_survey import SampledRef
from pipeline.decoder import Decoder
from pipeline.decoder_child import Prepared
from pipeline.errors import RowError
from pipeline.fetch import Fetched, Fetcher
from pipeline.job import Job, Task
from pipeline.prepare import decoder_options
from smolvlm.config import ModelConfig
from smolvlm.hub import resolve_checkpoint
from smolvlm.image import Tiles
from smolvlm.prompt import PromptEncoder, parse_messages

_ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class SampledImage:
    """One image of the sample: what decoding said, its bytes as stored, and the tokens of all prompts about it."""

    weight: float
    prepared: Prepared
    num_bytes: int | None
    prompt_tokens: int

    @property
    def error(self) -> RowError | None:
        """Why there will be no text for it, if so."""
        return self.prepared.error


@dataclass(frozen=True)
class Sample:
    """What preparing the sample showed.

    `fetch_s`: seconds of waiting for storage an image; `prepare_cpu_s`: CPU seconds an image for reading, decoding and
    splitting, on this machine. `tiles` are those of some good images, to try an engine on.
    """

    images: tuple[SampledImage, ...]
    tiles: tuple[Tiles, ...]
    fetch_s: float
    prepare_cpu_s: float


def prepare_sample(job: Job, refs: Sequence[SampledRef], keep: int) -> Sample:
    """Read and decode the sample with the pipeline's own parts, keeping the tiles of about `keep` images."""
    directory = resolve_checkpoint(job.model.id, job.model.revision)
    config = ModelConfig.from_pretrained(directory)
    prompts = Prompts(job.tasks, config, Tokenizer.from_file(str(directory / "tokenizer.json")))
    worker = _Worker(job, config, prompts, keep, max(1, len(refs) // max(keep, 1)))
    try:
        for start in range(0, len(refs), _ROWS_AT_ONCE):
            worker.take(refs[start : start + _ROWS_AT_ONCE])
    finally:
        worker.close()
    return worker.sample()


class Prompts:
    """How many tokens the prompts of all tasks make with an image of a grid. A job has few grids."""

    def __init__(self, tasks: Sequence[Task], config: ModelConfig, tokenizer: Tokenizer) -> None:
        self._encoder = PromptEncoder(tokenizer, config.image_seq_len)
        contents = [[{"type": "image"}, {"type": "text", "text": task.prompt}] for task in tasks]
        self._turns = [parse_messages([{"role": "user", "content": content}]) for content in contents]
        self._known: dict[tuple[int, int], int] = {}

    def tokens(self, rows: int, cols: int) -> int:
        """Return the number of tokens, added up over the tasks."""
        grid = (rows, cols)
        if grid not in self._known:
            self._known[grid] = sum(len(self._encoder.encode(turns, [grid])) for turns in self._turns)
        return self._known[grid]


class _Worker:
    """One prepare worker, with a clock beside it."""

    def __init__(self, job: Job, config: ModelConfig, prompts: Prompts, keep: int, every: int) -> None:
        self._fetcher = Fetcher(job.source, job.image.max_bytes)
        self._decoder = Decoder(decoder_options(job.image, config.image))
        self._decoder.prepare([b""])  # its child starts, which no image has to pay for
        self._prompts, self._keep, self._every = prompts, keep, every
        self._images: list[SampledImage] = []
        self._tiles: list[Tiles] = []
        self._fetch_s = self._cpu_s = 0.0

    def take(self, rows: Sequence[SampledRef]) -> None:
        started, own_s, child, child_s = time.monotonic(), time.process_time(), self._decoder.pid, self._child_s()
        fetched = self._fetcher.fetch([row.ref for row in rows])
        self._fetch_s += time.monotonic() - started
        prepared, tiles = self._decoder.prepare([item for item in fetched if isinstance(item, bytes)])
        self._cpu_s += time.process_time() - own_s
        if self._decoder.pid == child:  # else an image ended it, and its clock is gone with it
            self._cpu_s += self._child_s() - child_s
        answers, start = iter(prepared), 0
        for row, item in zip(rows, fetched, strict=True):
            answer = next(answers) if isinstance(item, bytes) else Prepared(error=item)
            self._add(row, item, answer, tiles[start : start + answer.num_bytes])
            start += answer.num_bytes

    def sample(self) -> Sample:
        count = max(len(self._images), 1)
        return Sample(tuple(self._images), tuple(self._tiles), self._fetch_s / count, self._cpu_s / count)

    def close(self) -> None:
        self._decoder.close()

    def _add(self, row: SampledRef, item: Fetched, answer: Prepared, tiles: bytes) -> None:
        prompt_tokens = 0 if answer.error else self._prompts.tokens(answer.rows, answer.cols)
        num_bytes = len(item) if isinstance(item, bytes) else None
        self._images.append(SampledImage(row.weight, answer, num_bytes, prompt_tokens))
        if tiles and len(self._images) % self._every == 0 and len(self._tiles) < self._keep:
            self._tiles.append(_tiles(answer, tiles))

    def _child_s(self) -> float:
        """CPU time of the decoder: other work on the machine does not count, as it would in waiting for it."""
        pid = self._decoder.pid
        return 0.0 if pid is None else time.clock_gettime((~pid << 3) | 2)  # clock_getcpuclockid(3)


def _tiles(answer: Prepared, data: bytes) -> Tiles:
    assert answer.num_tiles is not None
    side = math.isqrt(len(data) // (3 * answer.num_tiles))
    pixels = np.frombuffer(data, np.uint8).reshape(answer.num_tiles, side, side, 3)
    return Tiles(pixels, answer.rows, answer.cols)
