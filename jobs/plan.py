"""`smolvlm plan`: what a job will read, how long it will take and what it will cost, before anything starts.

The source is listed and a sample of it is read and decoded, with the pipeline's own parts; a run on one image tells
what starting takes, and the engine is tried on a few of the sample's, or a recorded profile tells both. Nothing is
written but a profile, if one is asked for.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from jobs.plan_profile import (
    Profile,
    TaskLength,
    calibrate,
    check_calibration,
    check_hardware,
    load_profile,
)
from jobs.plan_sample import Sample, SampledImage, prepare_sample
from jobs.plan_start import measure_start
from jobs.plan_survey import Survey, survey
from jobs.run import fetch_checkpoint
from pipeline.errors import ConfigError
from pipeline.job import Job

_KEPT_FOR_CALIBRATION = 32
_SIGMAS = 2.0  # of the interval: about 95 of 100
_NOISY = 0.05  # relative standard error of a calibration from which on the plan warns
_HOUR_S = 3600.0


@dataclass(frozen=True)
class Pool:
    """The machines to plan for. None: as the job says, or not known."""

    gpu: str | None = None
    replicas: int | None = None
    cpus: int | None = None
    """CPU cores of the whole pool; None: this machine's for a run on CPUs, else as many as it takes."""
    price_per_hour: float | None = None
    """What one engine replica costs an hour, with its part of all other machines."""


@dataclass(frozen=True)
class Figures:
    """Where the speed comes from: a recorded profile, or a calibration here that may be kept in `save_to`."""

    recorded: Path | None = None
    save_to: Path | None = None
    output_tokens: float | None = None
    """Tokens of all answers about an image, where someone knows better."""


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error."""

    value: float
    error: float = 0.0

    @property
    def relative(self) -> float:
        """The error as a share of the value."""
        return self.error / self.value if self.value else 0.0


@dataclass(frozen=True)
class Speed:
    """Images a second of the pool, what holds it back, and the CPU cores that keep one replica busy."""

    images_per_second: Estimate
    bottleneck: str
    cpus_per_replica: float


@dataclass(frozen=True)
class Plan:
    """All there is to say."""

    job: Job
    survey: Survey
    sample: Sample
    profile: Profile
    pool: Pool
    tiles: Estimate
    prompt_tokens: Estimate
    output_tokens: Estimate
    speed: Speed

    @property
    def replicas(self) -> int:
        """Engine replicas that were planned for."""
        return self.pool.replicas or self.job.engine.replicas[1]

    @property
    def price_per_hour(self) -> float | None:
        """What a replica costs an hour, None if nobody said."""
        return self.pool.price_per_hour or self.job.limits.price_per_hour

    @property
    def good(self) -> list[SampledImage]:
        """The sampled images that will be asked about."""
        return [image for image in self.sample.images if image.error is None]


def plan(job: Job, pool: Pool, figures: Figures, sample: int, say: Callable[[str], None]) -> Plan:
    """Plan the job. Raises ConfigError where the source, the model or the figures do not allow it.

    `say` is told what goes on.
    """
    recorded = None if figures.recorded is None else load_profile(figures.recorded, job, pool.gpu)
    if recorded is None:
        check_calibration(job, pool.gpu)
    fetch_checkpoint(job.model)
    say("listing the source")
    found = survey(job.source, job.limit, sample, job.seed)
    if not found.images:
        raise ConfigError(f"source.uri {job.source.uri}: no image, tar or Parquet file found; check address and glob")
    say(f"{found.images:,} images; reading {len(found.sample):,} of them")
    prepared = prepare_sample(job, found.sample, _KEPT_FOR_CALIBRATION)
    if not prepared.tiles:
        raise ConfigError(f"source.uri {job.source.uri}: no image of the sample is good ({_codes(prepared)})")
    profile = recorded or _calibrated(job, prepared, pool, figures, say)
    return _plan(job, found, prepared, profile, pool, figures)


def to_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as one object: shares from 0 to 1, seconds, hours, bytes; `cost` is null without a price."""
    rate = plan.speed.images_per_second
    low, high = _interval(rate)
    hours = _hours(plan, rate.value)
    return {
        "images": plan.survey.images,
        "bytes": round(total_bytes(plan)),
        "bytes_are_estimated": plan.survey.sized + plan.survey.listed_errors.total() < plan.survey.images,
        "sampled": len(plan.sample.images),
        "bad_share": bad_share(plan),
        "errors_by_code": errors_by_code(plan),
        "formats": _shares((image.prepared.format, image.weight) for image in plan.good),
        "tiles_per_image": plan.tiles.value,
        "tiles": histogram(plan.good, lambda image: image.prepared.num_tiles or 0),
        "prompt_tokens_per_image": plan.prompt_tokens.value,
        "prompt_tokens": histogram(plan.good, lambda image: image.prompt_tokens),
        "output_tokens_per_image": plan.output_tokens.value,
        "hardware": plan.profile.hardware,
        "replicas": plan.replicas,
        "cpus": _cpus(plan),
        "images_per_second": rate.value,
        "images_per_second_interval": [low, high],
        "hours": hours,
        "hours_interval": [_hours(plan, high), _hours(plan, low)],
        "cost": _cost(plan, hours),
        "cost_interval": None if plan.price_per_hour is None else [_cost(plan, _hours(plan, r)) for r in (high, low)],
        "bottleneck": plan.speed.bottleneck,
        "cpus_per_replica": plan.speed.cpus_per_replica,
        "fetch_seconds_per_image": plan.sample.fetch_s,
        "prepare_cpu_seconds_per_image": plan.sample.prepare_cpu_s,
        "seconds_per_tile": plan.profile.tile_s,
        "seconds_per_output_token": plan.profile.output_token_s,
        "load_seconds": plan.profile.load_s,
        "start_seconds": plan.profile.start_s,
        "calibration_rounds": plan.profile.rounds,
        "calibration_spread": plan.profile.spread,
        "warnings": warnings(plan),
    }


def warnings(plan: Plan) -> list[str]:
    """Return why the figures may be worth less than they look."""
    profile, found = plan.profile, []
    if profile.spread > _NOISY:
        found.append(
            f"the calibration is noisy: {profile.rounds} rounds leave ±{_SIGMAS * profile.spread:.0%}; was the machine "
            "busy with something else? Plan again when it is not"
        )
    if not profile.output_token_s:
        found.append(
            "whole answers took no longer than single tokens, so their length counts for nothing here: they are too "
            "short to measure, or the machine was busy with something else"
        )
    return found


def total_bytes(plan: Plan) -> float:
    """Bytes of all images; where the listing does not tell sizes, those of the sample stand for the others."""
    read = [(image.num_bytes, image.weight) for image in plan.sample.images if image.num_bytes is not None]
    unknown = plan.survey.images - plan.survey.listed_errors.total() - plan.survey.sized
    weight = sum(weight for _, weight in read)
    each = sum(size * weight for size, weight in read) / weight if weight else 0.0
    return plan.survey.known_bytes + unknown * each


def errors_by_code(plan: Plan) -> dict[str, int]:
    """How many error rows of each code to expect."""
    counts: Counter[str] = Counter(plan.survey.listed_errors)
    expected: Counter[str] = Counter()
    for image in plan.sample.images:
        if image.error is not None:
            expected[image.error.code] += image.weight  # type: ignore[assignment]
    for code, weight in expected.items():
        counts[code] += round(weight)
    return dict(sorted(counts.items()))


def bad_share(plan: Plan) -> float:
    """The share of inputs that will become error rows."""
    bad = sum(image.weight for image in plan.sample.images if image.error is not None)
    return (plan.survey.listed_errors.total() + bad) / plan.survey.images


def histogram(images: Sequence[SampledImage], value: Callable[[SampledImage], int]) -> dict[int, float]:
    """The share of images with each value."""
    return dict(sorted(_shares((value(image), image.weight) for image in images).items()))


def _plan(job: Job, found: Survey, sample: Sample, profile: Profile, pool: Pool, figures: Figures) -> Plan:
    good = [image for image in sample.images if image.error is None]
    tiles = _weighted_mean([(image.prepared.num_tiles or 0, image.weight) for image in good])
    prompt_tokens = _weighted_mean([(image.prompt_tokens, image.weight) for image in good])
    output_tokens = _output_tokens(job, profile, figures)
    ok = sum(image.weight for image in good) / found.images
    speed = _speed(job, pool, profile, sample, tiles, output_tokens, ok)
    return Plan(job, found, sample, profile, pool, tiles, prompt_tokens, output_tokens, speed)


def _speed(
    job: Job, pool: Pool, profile: Profile, sample: Sample, tiles: Estimate, output_tokens: Estimate, ok: float
) -> Speed:
    replicas = pool.replicas or job.engine.replicas[1]
    vision_s, decode_s = ok * profile.tile_s * tiles.value, ok * profile.output_token_s * output_tokens.value
    generate_s = (vision_s + decode_s) / replicas
    worker_s = max(sample.prepare_cpu_s, sample.fetch_s)  # a worker reads the next images while it decodes
    if profile.device == "cpu":
        # One set of cores does both, so their times add up; waiting for storage takes no core.
        cpus = pool.cpus or os.cpu_count() or 1
        prepare_s, seconds = sample.prepare_cpu_s / cpus, generate_s + sample.prepare_cpu_s / cpus
    else:
        prepare_s = worker_s / pool.cpus if pool.cpus else 0.0
        seconds = max(generate_s, prepare_s)
    spread = sqrt((vision_s * tiles.relative) ** 2 + (decode_s * output_tokens.relative) ** 2) / (vision_s + decode_s)
    error = sqrt(spread**2 + profile.spread**2)
    bottleneck = "generate" if generate_s >= prepare_s else "prepare" if worker_s > sample.fetch_s else "read"
    return Speed(Estimate(1 / seconds, error / seconds), bottleneck, worker_s / (generate_s * replicas))


def _output_tokens(job: Job, profile: Profile, figures: Figures) -> Estimate:
    if figures.output_tokens is not None:
        return Estimate(figures.output_tokens)
    lengths: list[TaskLength] = []
    for task in job.tasks:
        length = profile.length(task)
        if length is None:
            remedy = (
                "record one with this task, or say how many tokens all answers about an image have: --output-tokens"
            )
            raise ConfigError(f"task {task.name}: the profile does not tell how long its answers are; {remedy}")
        lengths.append(length)
    return Estimate(sum(each.mean for each in lengths), sqrt(sum(each.error**2 for each in lengths)))


def _calibrated(job: Job, sample: Sample, pool: Pool, figures: Figures, say: Callable[[str], None]) -> Profile:
    say("timing a run on one image")
    start_s = measure_start(job)  # first: an engine in this process would leave no room for another on a GPU
    say("trying the engine on some of them")
    profile = calibrate(job, sample.tiles, start_s)
    check_hardware(profile, pool.gpu)
    if figures.save_to is not None:
        profile.save(figures.save_to)
    return profile


def _weighted_mean(values: Sequence[tuple[float, float]]) -> Estimate:
    total = sum(weight for _, weight in values)
    mean = sum(value * weight for value, weight in values) / total
    return Estimate(mean, sqrt(sum((weight * (value - mean)) ** 2 for value, weight in values)) / total)


def _interval(rate: Estimate) -> tuple[float, float]:
    """The slowest and the fastest rate to expect; seconds are what errs, so they take the error."""
    return rate.value / (1 + _SIGMAS * rate.relative), rate.value / max(1 - _SIGMAS * rate.relative, 0.1)


def _hours(plan: Plan, rate: float) -> float:
    return (plan.profile.start_s + plan.survey.images / rate) / _HOUR_S


def _cost(plan: Plan, hours: float) -> float | None:
    return None if plan.price_per_hour is None else hours * plan.replicas * plan.price_per_hour


def _cpus(plan: Plan) -> int | None:
    return plan.pool.cpus or (os.cpu_count() if plan.profile.device == "cpu" else None)


def _shares(weighted: Iterable[tuple[Any, float]]) -> dict[Any, float]:
    shares: dict[Any, float] = {}
    for key, weight in weighted:
        shares[key] = shares.get(key, 0.0) + weight
    total = sum(shares.values())
    return {key: value / total for key, value in shares.items()}


def _codes(sample: Sample) -> str:
    return ", ".join(sorted({image.error.code for image in sample.images if image.error is not None}))
