"""A plot of the engine's benchmark: images/s against batch, and the time of the largest batch by phase."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COLOURS = {"vision": "tab:blue", "prefill": "tab:orange", "decode": "tab:green"}


def draw(batches: list[dict[str, Any]], title: str, path: Path) -> None:
    """`batches` are the results of one batch size each, as benchmarks/engine.py reports them."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    figure.suptitle(title)
    rates, phases = figure.subplots(1, 2)
    sides = list(batches[-1]["details"])
    for side in sides:
        each = [result["details"][side] for result in batches]
        middle = [one["images_per_s"] for one in each]
        low, high = zip(*(one["images_per_s_min_max"] for one in each), strict=True)
        spread = [
            [m - one for m, one in zip(middle, low, strict=True)],
            [o - m for m, o in zip(middle, high, strict=True)],
        ]
        rates.errorbar([result["batch"] for result in batches], middle, yerr=spread, marker="o", capsize=3, label=side)
    rates.plot([result["batch"] for result in batches], [result["limit"] for result in batches], "k--", label="limit")
    rates.set(xlabel="batch, images", ylabel="images/s", ylim=(0, None))
    rates.legend()
    seconds = {side: batches[-1]["details"][side]["phase_s"] for side in sides} | {"limit": batches[-1]["limit_s"]}
    below = dict.fromkeys(seconds, 0.0)
    for phase, colour in COLOURS.items():
        phases.bar(
            list(seconds),
            [each[phase] for each in seconds.values()],
            bottom=list(below.values()),
            color=colour,
            label=phase,
        )
        below = {side: below[side] + seconds[side][phase] for side in seconds}
    phases.set(ylabel=f"seconds, batch {batches[-1]['batch']}")
    phases.legend()
    figure.savefig(path, dpi=100)
