"""`_job.json`: the job that a destination belongs to. A resume must be the same job."""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.errors import FingerprintMismatch
from pipeline.job import Job
from pipeline.storage import Location
from smolvlm.hub import resolve_checkpoint

FINGERPRINT_KEY = "smolvlm.fingerprint"
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


def fingerprint(job: Job) -> dict[str, Any]:
    """Return what must not change on a resume; a local checkpoint is known by its content, not by its path."""
    content = job.fingerprint()
    if job.model.revision is None:
        content["model.content"] = _checkpoint_digest(resolve_checkpoint(job.model.id, None))
        del content["model.id"]
    return content


def check_claim(destination: Location, job: Job) -> None:
    """Raise FingerprintMismatch, naming each difference, if the destination belongs to another job."""
    try:
        stored = json.loads(destination.child("_job.json").read())["fingerprint"]
    except FileNotFoundError:
        return
    wanted = json.loads(json.dumps(fingerprint(job)))
    changed = [key for key in sorted({*stored, *wanted}) if stored.get(key) != wanted.get(key)]
    if changed:
        lines = [f"  {key}: {stored.get(key)!r} in the output, {wanted.get(key)!r} now" for key in changed]
        raise FingerprintMismatch(
            f"{destination.uri} holds rows of a different job:\n"
            + "\n".join(lines)
            + "\nRestore the job or choose another output."
        )


def claim(destination: Location, job: Job) -> None:
    """Write `_job.json` unless it is there; then it must be ours."""
    content = {"name": job.name, "fingerprint": fingerprint(job), "job": asdict(job), "version": package_version()}
    if not destination.child("_job.json").put_if_absent(json.dumps(content, indent=1).encode()):
        check_claim(destination, job)


def file_metadata(job: Job) -> dict[str, str]:
    """Return what every Parquet file says about where its rows came from."""
    return {
        "smolvlm.job": job.name,
        FINGERPRINT_KEY: fingerprint_digest(fingerprint(job)),
        "smolvlm.model": job.model.id,
        "smolvlm.revision": job.model.revision or "",
        "smolvlm.version": package_version(),
    }


def fingerprint_digest(content: Mapping[str, Any]) -> str:
    """Return the fingerprint in short, as every Parquet file carries it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def package_version() -> str:
    """Return this package's version."""
    return importlib.metadata.version("smolvlm-pipeline")


def _checkpoint_digest(directory: Path) -> str:
    """Digest configs whole, weights by their header and samples: that tells any two trainings apart, in no time."""
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix == ".json":
            digest.update(path.name.encode() + path.read_bytes())
        elif path.suffix == ".safetensors":
            size = path.stat().st_size
            digest.update(f"{path.name}/{size}".encode())
            with path.open("rb") as file:
                for index in range(_SAMPLES):
                    file.seek(index * size // _SAMPLES)
                    digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
