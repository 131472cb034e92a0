"""Turns and slants a page, and says where its points go."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, radians, sin

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float64]
DECIMALS = 12  # kept of a matrix: processors differ in the last ones, pictures must not


@dataclass(frozen=True)
class Warp:
    """A projective map of the page onto the image, both `size` (width, height) in pixels.

    matrix: float64 [3, 3], from page to image in homogeneous coordinates.
    """

    matrix: Floats
    size: tuple[int, int]

    @classmethod
    def of(cls, size: tuple[int, int], degrees: float, shifts: Floats) -> Warp:
        """Turn by degrees, clockwise, around the middle; then move the corners by `shifts` [4, 2] in pixels."""
        corners = _corners(0, 0, *size)
        middle = np.array(size) / 2
        turn = np.array(
            [[cos(radians(degrees)), sin(radians(degrees))], [-sin(radians(degrees)), cos(radians(degrees))]]
        )
        return cls(_homography(corners, (corners - middle) @ turn + middle + shifts), size)

    def points(self, points: Floats) -> Floats:
        """Map points [..., 2] of the page to points [..., 2] of the image."""
        mapped = points @ self.matrix[:, :2].T + self.matrix[:, 2]
        return np.asarray(mapped[..., :2] / mapped[..., 2:])

    def boxes(self, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map boxes [n, 4] to the axis-aligned hulls [n, 4] of what they become; NaN stays NaN."""
        hulls = self.points(boxes.astype(np.float64)[:, [[0, 1], [2, 1], [2, 3], [0, 3]]])
        return np.concatenate([hulls.min(axis=1), hulls.max(axis=1)], axis=1).astype(np.float32)

    def holds(self, area: tuple[float, float, float, float], margin: float) -> bool:
        """Whether the area of the page stays `margin` pixels away from the edges of the image."""
        moved = self.points(_corners(*area))
        return bool((moved >= margin).all() and (moved <= np.array(self.size) - margin).all())

    def outline(self) -> list[list[float]]:
        """Return where the corners of the page go, [4, 2]."""
        outline: list[list[float]] = self.points(_corners(0, 0, *self.size)).tolist()
        return outline

    def image(self, page: Image.Image) -> Image.Image:
        """Return the page as the map shows it, black where there is no page."""
        inverse = np.linalg.inv(self.matrix)
        coefficients = (inverse / inverse[2, 2]).round(DECIMALS).ravel()[:8].tolist()
        return page.transform(self.size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR)


def _corners(x0: float, y0: float, x1: float, y1: float) -> Floats:
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], np.float64)


def _homography(source: Floats, target: Floats) -> Floats:
    """Solve for the projective map [3, 3] that takes four points [4, 2] to four others [4, 2]."""
    rows = []
    for (x, y), (u, v) in zip(source, target, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
    solution = np.linalg.solve(np.array(rows), target.ravel()).round(DECIMALS)
    return np.append(solution, 1.0).reshape(3, 3)
