"""How fast an engine is on some hardware: measured by a short calibration run, or read from a recorded profile."""

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median, stdev

from jobs.shortcuts import has_gpu
from pipeline.claim import package_version
from pipeline.engine_worker import EngineWorker
from pipeline.errors import ConfigError
from pipeline.generate import Answer
from pipeline.job import Job, Task
from smolvlm.image import Tiles

_FEWEST_ROUNDS, _MOST_ROUNDS, _MOST_BATCHES = 3, 9, 4
_BUDGET_S = 45.0  # after which no round is begun
_ROUND_S = 8.0
_CALM = 0.02  # relative standard error at which another round tells nothing new


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
    full batch decodes; `spread`: relative standard error of both together, from `rounds` repeated measurements;
    `load_s`: from nothing to a working engine; `start_s`: of a whole run on one image, which loads it too.
    """

    hardware: str
    device: str
    model_id: str
    revision: str | None
    dtype: str
    quantization: str | None
    kv_cache_dtype: str
    sequences: int
    tile_s: float
    output_token_s: float
    rounds: int
    spread: float
    load_s: float
    start_s: float
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
    recorded = (profile.model_id, profile.revision, profile.dtype, profile.quantization, profile.kv_cache_dtype)
    model = job.model
    wanted = (model.id, model.revision, model.dtype, model.quantization, model.kv_cache_dtype)
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


def calibrate(job: Job, tiles: Sequence[Tiles], start_s: float) -> Profile:
    """Run the job's engine on some of its images, in this process, and return how fast it is. `start_s` goes with it.

    The same images go through it twice in each of several rounds, first with answers of one token, then with whole
    ones: what the whole ones take longer is what tokens take. No image is ever the same to the engine twice: nothing
    is cached.
    """
    started = time.monotonic()
    worker = EngineWorker.for_job(job)
    load_s = time.monotonic() - started
    try:
        sequences = int(worker.status("calibration").stats["max_num_sequences"])
        _answers(worker, job.tasks, tiles[:1])  # what is compiled and allocated once
        rounds = _rounds(worker, job, tiles, -(-sequences // len(job.tasks)))
    finally:
        worker.close()
    device = "cuda" if job.engine.gpus else "cpu"
    images_s, whole_s = (median(each.images_s for each in rounds), median(each.whole_s for each in rounds))
    answers = rounds[-1].answers
    return Profile(
        hardware=_hardware(device),
        device=device,
        model_id=job.model.id,
        revision=job.model.revision,
        dtype=job.model.dtype,
        quantization=job.model.quantization,
        kv_cache_dtype=job.model.kv_cache_dtype,
        sequences=sequences,
        tile_s=images_s / rounds[-1].tiles,
        output_token_s=max(whole_s - images_s, 0.0) / sum(each.output_tokens for row in answers for each in row),
        rounds=len(rounds),
        spread=_spread(rounds),
        load_s=load_s,
        start_s=start_s,
        lengths=tuple(_length(task, [row[place] for row in answers]) for place, task in enumerate(job.tasks)),
        version=package_version(),
        torch=_torch_version(),
    )


@dataclass(frozen=True)
class _Round:
    """Images with answers of one token, and the same ones with whole answers."""

    tiles: int
    images_s: float
    whole_s: float
    answers: list[list[Answer]]

    @property
    def seconds(self) -> float:
        return self.images_s + self.whole_s


def _rounds(worker: EngineWorker, job: Job, tiles: Sequence[Tiles], full: int) -> list[_Round]:
    """Repeat until the rounds agree. `full` images fill the engine's batch; where time allows, several such batches go
    in together, since a run has no end at which the batch is half empty."""
    trial = _round(worker, job, _cycled(tiles, full))
    if trial.seconds > _BUDGET_S:
        return [trial]
    batches = max(1, min(_MOST_BATCHES, int(_ROUND_S / trial.seconds)))
    rounds: list[_Round] = []
    until = time.monotonic() + _BUDGET_S
    while len(rounds) < _FEWEST_ROUNDS or (
        len(rounds) < _MOST_ROUNDS and time.monotonic() < until and _spread(rounds) > _CALM
    ):
        rounds.append(_round(worker, job, _cycled(tiles, full * batches)))
    return rounds


def _round(worker: EngineWorker, job: Job, images: Sequence[Tiles]) -> _Round:
    started = time.monotonic()
    _answers(worker, [replace(task, max_new_tokens=1) for task in job.tasks], images)
    images_s = time.monotonic() - started
    answers = _answers(worker, job.tasks, _cycled(images, len(images)))
    whole_s = time.monotonic() - started - images_s
    return _Round(sum(len(each.pixels) for each in images), images_s, whole_s, answers)


def _spread(rounds: Sequence[_Round]) -> float:
    """The relative standard error of the time of whole answers; 0 where it was measured once."""
    seconds = [each.whole_s for each in rounds]
    return stdev(seconds) / mean(seconds) / len(seconds) ** 0.5 if len(seconds) > 1 else 0.0


def _cycled(tiles: Sequence[Tiles], count: int) -> list[Tiles]:
    """`count` of the images, over and over. The engine knows an image by its object: give new ones."""
    return [replace(tiles[number % len(tiles)]) for number in range(count)]


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
