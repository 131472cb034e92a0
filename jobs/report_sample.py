"""Which rows a report shows: of every group some, so that what is rare is seen; the same ones for the same seed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.commit import Commit, read_columns, row_numbers
from pipeline.manifest import Manifest
from pipeline.storage import Location

LOW_LOGPROB = -1.0
"""Answers below this mean log-probability were, on average, less than 37 % sure of a token."""

_LABELS = {
    "ok": "without remark",
    "length": "cut at max_new_tokens",
    "repetition": "went in circles",
    "unsure": f"mean_logprob below {LOW_LOGPROB:g}",
}


def group_label(group: str) -> str:
    """Return the group's name for people."""
    return _LABELS.get(group, group.replace("error.", "error: "))


def group_order(group: str) -> tuple[int, str]:
    """Return a key that sorts groups: as above, then errors by code."""
    return (list(_LABELS).index(group) if group in _LABELS else len(_LABELS)), group


@dataclass(frozen=True)
class Drawn:
    """The rows drawn: number → group, the files that hold them, and how many rows each group has in all."""

    groups_by_number: Mapping[int, str]
    commits: Sequence[Commit]
    groups: Mapping[str, int]

    @property
    def numbers(self) -> npt.NDArray[np.int64]:
        """Their row numbers."""
        return np.fromiter(self.groups_by_number, np.int64)


@dataclass
class _Reservoir:
    """The rows of one group with the smallest keys so far: which these are does not depend on the order of files."""

    size: int
    total: int = 0
    keys: npt.NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    rows: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 2), np.int64))  # row number, file

    def add(self, keys: npt.NDArray[np.uint64], numbers: npt.NDArray[np.int64], file: int) -> None:
        self.total += len(keys)
        self.keys = np.concatenate([self.keys, keys])
        self.rows = np.concatenate([self.rows, np.stack([numbers, np.full_like(numbers, file)], axis=1)])
        order = np.argsort(self.keys)[: self.size]
        self.keys, self.rows = self.keys[order], self.rows[order]


def draw(
    destination: Location, commits: Sequence[Commit], manifest: Manifest, tasks: Sequence[str], samples: int, seed: int
) -> Drawn:
    """Draw up to `samples` rows, as equally from all groups as they allow."""
    columns = ["shard_id", "row", "status", "error"]
    columns += [f"{task}.{name}" for task in tasks for name in ("finish_reason", "mean_logprob")]
    reservoirs: dict[str, _Reservoir] = {}
    for file, table in enumerate(read_columns(destination, commits, columns)):
        numbers, groups = row_numbers(table, manifest.rows_per_shard), groups_of(table, tasks)
        keys = _shuffled(numbers, seed)
        for group in set(groups.tolist()):
            inside = groups == group
            reservoirs.setdefault(group, _Reservoir(samples)).add(keys[inside], numbers[inside], file)
    taken = shares({group: each.total for group, each in reservoirs.items()}, samples)
    rows = {group: reservoirs[group].rows[:count] for group, count in taken.items()}
    files = sorted({file for found in rows.values() for file in found[:, 1].tolist()})
    return Drawn(
        groups_by_number={number: group for group, found in rows.items() for number in found[:, 0].tolist()},
        commits=[commits[file] for file in files],
        groups=Counter({group: each.total for group, each in reservoirs.items()}),
    )


def groups_of(table: pa.Table, tasks: Sequence[str]) -> npt.NDArray[np.object_]:
    """Return each row's group: its error, else the worst that can be said of any of its answers."""
    codes = pc.fill_null(pc.struct_field(table["error"], "code"), "").to_numpy().astype(str)
    nothing = np.zeros(table.num_rows, bool)
    found = {"repetition": nothing, "length": nothing, "unsure": nothing}
    for task in tasks:
        reason = pc.fill_null(pc.struct_field(table[task], "finish_reason"), "").to_numpy().astype(str)
        logprob = pc.fill_null(pc.struct_field(table[task], "mean_logprob"), 0.0).to_numpy()
        found["repetition"] = found["repetition"] | (reason == "repetition")
        found["length"] = found["length"] | (reason == "length")
        found["unsure"] = found["unsure"] | (logprob < LOW_LOGPROB)
    is_error = np.asarray(pc.equal(table["status"], "error"))
    groups = np.full(table.num_rows, "ok", dtype=object)
    for group in reversed(found):
        groups[found[group]] = group
    groups[is_error] = [f"error.{code}" for code in codes[is_error]]
    return groups


def shares(totals: Mapping[str, int], samples: int) -> dict[str, int]:
    """Return how many to take of each group: all of the small ones, the rest equally from the others."""
    taken: dict[str, int] = {}
    left = samples
    for position, (group, total) in enumerate(sorted(totals.items(), key=lambda item: (item[1], item[0]))):
        taken[group] = min(total, -(-left // (len(totals) - position)))
        left -= taken[group]
    return taken


def _shuffled(numbers: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.uint64]:
    """Return a key for each row number that looks random but follows from it and the seed (SplitMix64's mixing)."""
    keys = numbers.astype(np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        keys = (keys ^ (keys >> np.uint64(shift))) * np.uint64(factor)
    return keys ^ (keys >> np.uint64(31))
