import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from smolvlm.training.plot import MOST_POINTS, _smoothed, _stretches, plot_metrics


def step(number: int, stage: str, **losses: float) -> dict[str, Any]:
    return {"step": number, "stage": stage, "losses": losses, "learning_rate": 1e-3}


def write(folder: Path, lines: list[dict[str, Any]]) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def colours(file: Path) -> set[tuple[int, int, int]]:
    with Image.open(file) as image:
        return {tuple(pixel) for pixel in np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0).tolist()}


BLUE, ORANGE, GREEN = (31, 119, 180), (255, 127, 14), (44, 160, 44)  # of matplotlib's tab:… colours


def test_every_loss_is_drawn_in_its_colour(tmp_path: Path) -> None:
    lines = [step(number, "glyphs", glyph=4 / number, reading=1.0) for number in range(1, 30)]
    assert {GREEN, ORANGE} <= colours(plot_metrics(write(tmp_path, lines)))
    assert BLUE not in colours(tmp_path / "loss.png")
    lines += [{"step": 20, "score": {"cer": 0.4, "wer": 1.7}}]
    assert BLUE in colours(plot_metrics(write(tmp_path, lines)))  # the character error rate


def test_curves_are_cut_between_stages() -> None:
    lines = [step(1, "a", text=1.0), step(2, "b", text=2.0), step(3, "b", text=3.0), step(4, "a", text=4.0)]
    assert [[line["step"] for line in stretch] for stretch in _stretches(lines)] == [[1], [2, 3], [4]]


def test_long_curves_are_means_of_their_stretches() -> None:
    assert _smoothed([1.0, 3.0]) == [1.0, 3.0]
    means = _smoothed(list(map(float, range(10 * MOST_POINTS))))
    assert len(means) == MOST_POINTS
    assert means[0] == 4.5


def test_a_run_without_a_step_has_no_curves(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no step in its metrics; train first"):
        plot_metrics(tmp_path)
