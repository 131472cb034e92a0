"""What an evaluation came to: the content of `evaluation.json`, and its table for people."""

import hashlib
import os
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jobs.readings import Evaluation, Reading, Settings
from smolvlm.hub import resolve_checkpoint
from smolvlm.training.metrics import measure

NORMALISATION = "NFC; outer white space, empty lines and repeated spaces do not count; case, digits and line breaks do"
HEADINGS = ("documents", "characters", "CER %", "WER %", "exact %", "ANLS %", "raw CER %")
_CHECKPOINT_FILES = ("*.safetensors", "config.json", "preprocessor_config.json", "tokenizer.json")
_PACKAGES = ("smolvlm-pipeline", "torch", "tokenizers", "pillow", "numpy", "rapidfuzz")


def report(evaluation: Evaluation, settings: Settings, source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `evaluation.json`; all rates are shares, with 95 % bootstrap intervals over documents.

    `overall` and each of `kinds` hold the figures of `all` readings and, where the source says which images are bad
    ones, of the `clean` and the `degraded`. Errors are documents that could not be read; no figure counts them.
    """
    readings, seconds = evaluation.readings, evaluation.seconds
    tokens = sum(reading.output_tokens for reading in readings)
    reasons = Counter(reading.finish_reason for reading in readings)
    kinds = sorted({reading.kind for reading in readings if reading.kind})
    return {
        "model": {**asdict(settings), "dtype": _computed_dtype(settings), "files": _file_digests(settings)},
        "source": {**source, "sha256": evaluation.digest},
        "documents": len(readings) + len(evaluation.errors),
        "errors": [asdict(error) for error in evaluation.errors],
        "normalisation": NORMALISATION,
        "overall": figures(readings),
        "kinds": {kind: figures([each for each in readings if each.kind == kind]) for kind in kinds},
        "finish_reasons": {reason: reasons[reason] for reason in ("stop", "length", "repetition")},
        "seconds": round(seconds, 3),
        "images_per_s": round(len(readings) / seconds, 3),
        "output_tokens": tokens,
        "tokens_per_s": round(tokens / seconds, 3),
        "machine": {"architecture": platform.machine(), "cpus": os.cpu_count(), "device": settings.device},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
    }


def figures(readings: Sequence[Reading]) -> dict[str, Any]:
    """Return the metrics of all readings, and of the clean and the degraded ones where the source tells them apart."""
    parts = {
        "all": list(readings),
        "clean": [reading for reading in readings if reading.degraded is False],
        "degraded": [reading for reading in readings if reading.degraded is True],
    }
    return {
        name: asdict(measure((reading.reference, reading.prediction) for reading in part))
        for name, part in parts.items()
        if part
    }


def table(content: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the rows below `HEADINGS`, each with its name first: overall, clean, degraded, then the same by kind."""
    for name, parts in {"overall": content["overall"], **content["kinds"]}.items():
        for part, metrics in parts.items():
            yield (name if part == "all" else f"{name}, {part}", *_cells(metrics))


def summary_text(content: Mapping[str, Any]) -> str:
    """Return the table and a few lines below it for a terminal."""
    rows = [("", *HEADINGS), *table(content)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(_padded(row, widths)) for row in rows]
    return "\n".join([*lines, "", *remarks(content)])


def remarks(content: Mapping[str, Any]) -> list[str]:
    """Return how answers ended, what could not be read, and the speed."""
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in content["finish_reasons"].items())
    errors = Counter(error["code"] for error in content["errors"])
    listed = ", ".join(f"{code} {count:,}" for code, count in errors.items()) or "none"
    return [
        f"answers ended by: {reasons}",
        f"documents that could not be read: {listed}",
        f"{content['images_per_s']:,.2f} images/s, {content['tokens_per_s']:,.0f} tokens/s",
    ]


def _cells(metrics: Mapping[str, Any]) -> tuple[str, ...]:
    rates = [_percent(metrics[name]) for name in ("cer", "wer", "exact", "anls")]
    return f"{metrics['documents']:,}", f"{metrics['characters']:,}", *rates, f"{100 * metrics['raw_cer']:.1f}"


def _percent(interval: Mapping[str, float]) -> str:
    value, low, high = (100 * interval[name] for name in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f}–{high:.1f})"


def _padded(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]


def _computed_dtype(settings: Settings) -> str:
    """What `auto` was on this device."""
    import torch

    from smolvlm.precision import dtype_named, name_of

    return name_of(dtype_named(settings.dtype, torch.device(settings.device)))


def _file_digests(settings: Settings) -> dict[str, str]:
    directory = resolve_checkpoint(settings.model, settings.revision)
    files = sorted({file for pattern in _CHECKPOINT_FILES for file in directory.glob(pattern)})
    return {file.name: _sha256(file) for file in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
