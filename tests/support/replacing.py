"""An output whose error rows are replaced again and again, by a process that a test kills at any moment."""

import sys
from collections.abc import Iterable

import pyarrow as pa

from pipeline.commit import write_commit
from pipeline.job import Task
from pipeline.lease import Fence
from pipeline.manifest import Manifest
from pipeline.records import output_schema
from pipeline.replace import replace_errors, waiting
from pipeline.storage import Location

ROWS, ROWS_PER_FILE, ROWS_PER_SHARD = 240, 40, 50
MANIFEST = Manifest(ROWS, ROWS_PER_SHARD, ())
SCHEMA = output_schema((Task("caption", "Describe."),))


def is_bad(number: int) -> bool:
    """Whether the image stays an error until the last round."""
    return number % 3 == 0


def table(numbers: Iterable[int], made_by: str, ok: bool = False) -> pa.Table:
    """Rows that say in every column who made them: every third an error, unless all are to be ok."""
    rows = []
    for n in numbers:
        error = {"code": "read_failed", "stage": "read", "message": made_by, "attempts": 1}
        is_ok = ok or not is_bad(n)
        place = {"uri": f"u{n}", "shard_id": n // ROWS_PER_SHARD, "row": n % ROWS_PER_SHARD, "sha256": made_by}
        outcome = {"status": "ok", "caption": {"text": made_by}} if is_ok else {"status": "error", "error": error}
        rows.append({**place, **outcome})
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def write_first(destination: Location) -> None:
    """Commit all rows, every third of them an error."""
    for start in range(0, ROWS, ROWS_PER_FILE):
        write_commit(destination, table(range(start, start + ROWS_PER_FILE), "first"), ROWS_PER_SHARD, {})


def stage(destination: Location, made_by: str, ok: bool = False) -> None:
    """Let new rows for all errors wait, cut into files in another way than `data/` is."""
    bad = list(filter(is_bad, range(ROWS)))
    for start in range(0, len(bad), 17):
        new = table(bad[start : start + 17], made_by, ok)
        write_commit(waiting(destination), new, ROWS_PER_SHARD, {"smolvlm.job": made_by})


def fence(destination: Location) -> Fence:
    """A lease that nobody takes."""
    return Fence(destination.child("_lease"), 1)


def main() -> None:
    """Replace for ever, saying so after every round."""
    destination = Location(sys.argv[1], sys.argv[2] or None)
    for turn in range(1_000_000):
        stage(destination, f"{sys.argv[3]}-{turn}")
        replace_errors(destination, MANIFEST, fence(destination))
        print(turn, flush=True)


if __name__ == "__main__":
    main()
