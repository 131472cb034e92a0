"""How fast an engine is on some hardware: measured by a short calibration run, or read from a recorded profile."""

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev

from jobs.shortcuts import has_gpu
from pipeline.claim import package_version
from pipeline.engine_worker import EngineWorker
from pipeline.errors import ConfigError
from pipeline.generate import Answer
from pipeline.job import Job, Task
from smolvlm.image import Tiles

_ROUNDS = 3
_TILES_PER_ROUND = {"cpu": 16, "cuda": 512}  # enough to fill the encoder's batches


@dataclass(frozen=True)
class TaskLength:
    """How long the answers of one task were, in tokens; `error` is the standard error of the mean."""

    prompt: str
    max_new_tokens: int
    mean: float
    error: float


@dataclass(frozen=True)
class Profile:
    """One engine replica on one kind of hardware.

    `tile_s`: seconds a tile for the encoder and the prompts; `output_token_s`: seconds a token of an answer while a
    full batch decodes; `spread`: relative, between repeated measurements; `load_s`: from nothing to a working engine.
    """

    hardware: str
    device: str
    model_id: str
    revision: str | None
    dtype: str
    sequences: int
    tile_s: float
    output_token_s: float
    spread: float
    load_s: float
    lengths: tuple[TaskLength, ...]
    version: str
    torch: str

    def save(self, path: Path) -> None:
        """Write the profile as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    def length(self, task: Task) -> TaskLength | None:
        """Return how long answers of a task were, None if another prompt or limit was measured."""
        wanted = (task.prompt, task.max_new_tokens)
        return next((each for each in self.lengths if (each.prompt, each.max_new_tokens) == wanted), None)


def load_profile(path: Path, job: Job, gpu: str | None) -> Profile:
    """Read a recorded profile. Raises ConfigError unless it is of the job's model, and of `gpu` if that is given."""
    try:
        content = json.loads(path.read_text())
        lengths = tuple(TaskLength(**each) for each in content.pop("lengths"))
        profile = Profile(**content, lengths=lengths)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"--profile {path}: {error}; give a file that `smolvlm plan … --save-profile` has written"
        ) from None
    recorded = (profile.model_id, profile.revision, profile.dtype)
    wanted = (job.model.id, job.model.revision, job.model.dtype)
    if recorded != wanted:
        raise ConfigError(f"--profile {path}: measured with the model {recorded}, the job has {wanted}; record another")
    check_hardware(profile, gpu)
    return profile


def check_hardware(profile: Profile, gpu: str | None) -> None:
    """Raise ConfigError if the profile is not of that GPU."""
    if gpu is not None and gpu.casefold() not in profile.hardware.casefold():
        raise ConfigError(f"--gpu {gpu}: the figures are of {profile.hardware}; {_record(gpu)}")


def check_calibration(job: Job, gpu: str | None) -> None:
    """Raise ConfigError if a calibration run on this machine would not be one on the job's hardware."""
    if has_gpu():
        return
    if gpu is not None:
        raise ConfigError(f"--gpu {gpu}: this machine has no GPU to measure on; {_record(gpu)}")
    if job.engine.gpus:
        remedy = f"plan a run on CPUs with --gpus 0, or {_record('gpu')}"
        raise ConfigError(f"engine.gpus {job.engine.gpus:g}: this machine has no GPU to measure on; {remedy}")


def calibrate(job: Job, tiles: Sequence[Tiles]) -> Profile:
    """Run the job's engine on some of its images, in this process, and return how fast it is.

    First the images alone (answers of one token), three times; then a full batch with whole answers, whose time beyond
    that of its images is what the tokens take. No image is ever the same to the engine twice: nothing is cached.
    """
    started = time.monotonic()
    worker = EngineWorker.for_job(job)
    load_s = time.monotonic() - started
    try:
        sequences = int(worker.status("calibration").stats["max_num_sequences"])
        _answers(worker, job.tasks, tiles[:1])  # what is compiled and allocated once
        device = "cuda" if job.engine.gpus else "cpu"
        tile_s = _tile_seconds(worker, job, tiles, _TILES_PER_ROUND[device])
        batch = _cycled(tiles, -(-sequences // len(job.tasks)))
        started = time.monotonic()
        answers = _answers(worker, job.tasks, batch)
        elapsed_s = time.monotonic() - started
    finally:
        worker.close()
    tokens = sum(answer.output_tokens for row in answers for answer in row)
    images_s = mean(tile_s) * sum(len(each.pixels) for each in batch)
    return Profile(
        hardware=_hardware(device),
        device=device,
        model_id=job.model.id,
        revision=job.model.revision,
        dtype=job.model.dtype,
        sequences=sequences,
        tile_s=mean(tile_s),
        output_token_s=max(elapsed_s - images_s, 0.0) / tokens,
        spread=(max(tile_s) - min(tile_s)) / 2 / mean(tile_s),
        load_s=load_s,
        lengths=tuple(_length(task, [row[place] for row in answers]) for place, task in enumerate(job.tasks)),
        version=package_version(),
        torch=_torch_version(),
    )


def _tile_seconds(worker: EngineWorker, job: Job, tiles: Sequence[Tiles], per_round: int) -> list[float]:
    """Seconds a tile with answers of one token, of each round."""
    count = max(1, round(per_round / mean(len(each.pixels) for each in tiles)))
    tasks = [replace(task, max_new_tokens=1) for task in job.tasks]
    seconds = []
    for number in range(_ROUNDS):
        images = _cycled(tiles, count, start=number * count)
        started = time.monotonic()
        _answers(worker, tasks, images)
        seconds.append((time.monotonic() - started) / sum(len(each.pixels) for each in images))
    return seconds


def _cycled(tiles: Sequence[Tiles], count: int, start: int = 0) -> list[Tiles]:
    """`count` of the images from `start` on, over and over. The engine knows an image by its object: give new ones."""
    return [replace(tiles[(start + number) % len(tiles)]) for number in range(count)]


def _answers(worker: EngineWorker, tasks: Sequence[Task], images: Sequence[Tiles]) -> list[list[Answer]]:
    pending = [[worker.submit(tiles, task, seed=number) for task in tasks] for number, tiles in enumerate(images)]
    return [[wait() for wait in row] for row in pending]


def _length(task: Task, answers: Sequence[Answer]) -> TaskLength:
    counts = [answer.output_tokens for answer in answers]
    error = stdev(counts) / len(counts) ** 0.5 if len(counts) > 1 else 0.0
    return TaskLength(task.prompt, task.max_new_tokens, mean(counts), error)


def _record(gpu: str) -> str:
    return (
        f"record a profile on a machine with that GPU (`smolvlm plan JOB.yaml --save-profile {gpu}.json`) and give it "
        f"with --profile {gpu}.json"
    )


def _hardware(device: str) -> str:
    if device == "cpu":
        return f"{os.cpu_count()} cores {_cpu_name()}"
    import torch

    return str(torch.cuda.get_device_name())


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _torch_version() -> str:
    import torch

    return torch.__version__
