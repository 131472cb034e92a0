"""Check an output against its manifest and its own account: every input exactly once, every file as it was written."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.stored import StoredJob, stored_job
from jobs.verify_file import CheckedFile, FileChecker, Problem
from pipeline.claim import fingerprint_digest
from pipeline.errors import ConfigError
from pipeline.finish import read_success
from pipeline.manifest import Manifest, load_manifest
from pipeline.records import output_schema
from pipeline.storage import Location

_PROBLEMS_SHOWN = 20


@dataclass(frozen=True)
class Report:
    """What a destination holds. `duplicate` counts the rows beyond the one that each input owes.

    `unreadable` files cannot be read to their end as what the job writes; none of their rows count.
    """

    inputs: int
    rows: int
    ok: int
    error: int
    missing: int
    duplicate: int
    unreadable: int
    errors_by_code: dict[str, int]
    problems: tuple[Problem, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every input has exactly one row, ok or error, in a file that is as the job wrote it."""
        exact = not (self.missing or self.duplicate or self.problems)
        return exact and self.rows == self.inputs == self.ok + self.error

    def to_json(self) -> dict[str, Any]:
        """Return it for programs."""
        return {**asdict(self), "problems": [asdict(problem) for problem in self.problems]}

    def to_text(self) -> str:
        """Return the report for a person."""
        lines = [f"{name:11}{value:>12,}" for name, value in self.to_json().items() if isinstance(value, int)]
        lines += [f"  error {code}: {count:,}" for code, count in self.errors_by_code.items()]
        lines += [f"  {each.kind}: {each.file}: {each.detail}" for each in self.problems[:_PROBLEMS_SHOWN]]
        if len(self.problems) > _PROBLEMS_SHOWN:
            lines.append(f"  and {len(self.problems) - _PROBLEMS_SHOWN:,} more problems; --json lists all")
        return "\n".join([*lines, "every input has exactly one row" if self.passed else "NOT complete"])


def verify(uri: str, endpoint_url: str | None = None) -> Report:
    """Read the manifest and every byte of every Parquet file below `uri`; a byte per input is held in memory.

    Raises ConfigError if there is no complete manifest, so that nothing says what the rows should be.
    """
    destination = Location(uri, endpoint_url)
    manifest = load_manifest(destination)
    if manifest is None:
        remedy = "check the address; if the job stopped while listing its source, run it again"
        raise ConfigError(f"{uri}: no complete manifest here, so no job output to verify; {remedy}")
    stored = stored_job(uri, endpoint_url)
    checker = FileChecker(
        destination, manifest, output_schema(stored.job.tasks), fingerprint_digest(stored.fingerprint)
    )
    tally = _Tally(manifest)
    for file in _data_files(destination):
        tally.add(checker.check(file))
    return tally.report([*_job_problems(stored), *_success_problems(destination, tally)])


class _Tally:
    """Adds files up; `digests` and `counts` are those of what is there."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._seen: npt.NDArray[np.bool_] = np.zeros(manifest.rows, dtype=np.bool_)
        self._problems: list[Problem] = []
        self.counts: Counter[str] = Counter()
        self.rows = 0
        self.digests: dict[str, str] = {}

    def add(self, file: CheckedFile) -> None:
        self.digests[file.name] = file.sha256
        self._problems += file.problems
        self.rows += len(file.numbers)
        self._seen[file.numbers[file.numbers >= 0]] = True
        self.counts += file.counts

    def report(self, more: list[Problem]) -> Report:
        present = int(self._seen.sum())
        problems = sorted([*self._problems, *more], key=lambda each: (each.file, each.kind))
        codes = {key.removeprefix("error."): n for key, n in self.counts.items() if key.startswith("error.")}
        return Report(
            inputs=self._manifest.rows,
            rows=self.rows,
            ok=self.counts["ok"],
            error=self.counts["error"],
            missing=self._manifest.rows - present,
            duplicate=self.rows - present,
            unreadable=sum(problem.kind in ("unreadable", "schema") for problem in problems),
            errors_by_code=dict(sorted(codes.items())),
            problems=tuple(problems),
        )


def _job_problems(stored: StoredJob) -> Iterator[Problem]:
    """A local checkpoint stands in the fingerprint by its content, which is not there to compare."""
    wanted = json.loads(json.dumps(stored.job.fingerprint()))
    by_content = "model.content" in stored.fingerprint
    changed = [
        key
        for key in sorted({*wanted, *stored.fingerprint} - ({"model.id", "model.content"} if by_content else set()))
        if wanted.get(key) != stored.fingerprint.get(key)
    ]
    if changed:
        yield Problem("job", "_job.json", f"its fingerprint is not that of its job: {', '.join(changed)}")


def _success_problems(destination: Location, tally: _Tally) -> Iterator[Problem]:
    """Compare `_SUCCESS.json` with what is there: files dropped, added or changed since the job finished."""
    try:
        content = read_success(destination)
        if content is None:
            yield Problem("unfinished", "_SUCCESS.json", "not there; run the same job, or the retry, again to its end")
            return
        digests = {name: file["sha256"] for name, file in content["files"].items()}
        counts = {name: content[name] for name in ("rows", "ok", "error")}
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        yield Problem("unreadable", "_SUCCESS.json", f"{type(error).__name__}: {error}")
        return
    for name in sorted(digests.keys() - tally.digests.keys()):
        yield Problem("dropped", name, "listed in _SUCCESS.json, but gone")
    for name in sorted(tally.digests.keys() - digests.keys()):
        yield Problem("added", name, "not listed in _SUCCESS.json")
    for name in sorted(digests.keys() & tally.digests.keys()):
        if digests[name] != tally.digests[name]:
            yield Problem("changed", name, "its digest is not that in _SUCCESS.json")
    found = {"rows": tally.rows, "ok": tally.counts["ok"], "error": tally.counts["error"]}
    if counts != found:
        yield Problem("totals", "_SUCCESS.json", f"it says {counts}, the files hold {found}")


def _data_files(destination: Location) -> Iterator[Location]:
    directory = destination.child("data")
    for found in directory.list():
        name = found.uri.rpartition("/")[2]
        # A leading dot is a write under way on a local file system; readers skip it as well.
        if name.endswith(".parquet") and not name.startswith("."):
            yield directory.at(found.uri)
