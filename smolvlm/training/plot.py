"""loss.png: what metrics.jsonl holds, drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from smolvlm.training.run import read_metrics

PLOT_FILE = "loss.png"
MOST_POINTS = 200  # of a curve; each is then the mean of its stretch
COLOURS = {"text": "tab:blue", "glyph": "tab:orange", "reading": "tab:green"}


def plot_metrics(output: Path) -> Path:
    """Draw losses, learning rate and error rates of the run in `output` over its steps, stages side by side.

    Raises ValueError where nothing was logged.
    """
    lines = read_metrics(output)
    steps = [line for line in lines if "losses" in line]
    if not steps:
        raise ValueError(f"{output} holds no step in its metrics; train first")
    scores = [line for line in lines if "score" in line]
    figure = Figure(figsize=(9, 9 if scores else 6), layout="constrained")
    panels = figure.subplots(3 if scores else 2, 1, sharex=True)
    _draw_losses(panels[0], steps)
    _draw_rates(panels[1], steps)
    if scores:
        _draw_scores(panels[2], scores)
    _mark_stages(list(panels), steps)
    panels[-1].set_xlabel("optimizer step")
    figure.savefig(output / PLOT_FILE, dpi=100)
    return output / PLOT_FILE


def _draw_losses(axes: Axes, steps: list[dict[str, Any]]) -> None:
    for name in sorted({name for line in steps for name in line["losses"]}):
        for stretch in _stretches([line for line in steps if name in line["losses"]]):
            xs, ys = [line["step"] for line in stretch], [line["losses"][name] for line in stretch]
            axes.plot(_smoothed(xs), _smoothed(ys), color=COLOURS[name], label=name)
    axes.set_ylabel("loss")
    axes.set_yscale("log")
    _legend(axes)


def _draw_rates(axes: Axes, steps: list[dict[str, Any]]) -> None:
    axes.plot([line["step"] for line in steps], [line["learning_rate"] for line in steps], color="tab:grey")
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)


def _draw_scores(axes: Axes, scores: list[dict[str, Any]]) -> None:
    xs = [line["step"] for line in scores]
    for name, label in (("cer", "character error rate"), ("wer", "word error rate")):
        axes.plot(xs, [min(line["score"][name], 1.0) for line in scores], marker="o", label=label)
    axes.set_ylabel("errors (1 or more drawn as 1)")
    axes.set_ylim(0, 1.05)
    _legend(axes)


def _mark_stages(all_axes: list[Axes], steps: list[dict[str, Any]]) -> None:
    """A dotted line where a stage begins, its name above the first picture."""
    previous = None
    for line in steps:
        if line["stage"] != previous:
            previous = line["stage"]
            for axes in all_axes:
                axes.axvline(line["step"] - 0.5, color="lightgrey", linestyle=":")
            place = all_axes[0].get_xaxis_transform()
            all_axes[0].text(line["step"], 1.01, previous, transform=place, fontsize="small")


def _stretches(steps: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Cut where a stage ends: its loss has another meaning in the next."""
    stretches: list[list[dict[str, Any]]] = []
    for line in steps:
        if not stretches or stretches[-1][-1]["stage"] != line["stage"]:
            stretches.append([])
        stretches[-1].append(line)
    return stretches


def _smoothed(values: list[float]) -> list[float]:
    return [float(part.mean()) for part in np.array_split(values, min(len(values), MOST_POINTS))]


def _legend(axes: Axes) -> None:
    """One entry a name, however many stretches it has."""
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    if unique:
        axes.legend(unique.values(), unique.keys())
