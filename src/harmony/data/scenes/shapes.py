"""The outlines of the shapes as signed distances: negative inside, zero on the outline, in units of the radius.

Each function takes the coordinates x (to the right) and y (downwards) of any array of points, for a shape that stands
upright at the origin and is about as large as a circle of radius 1; none reaches further than 1.2.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]


def _circle(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - np.float32(0.93)


def _ring(x: Array, y: Array) -> Array:
    return np.abs(np.hypot(x, y) - np.float32(0.7)) - np.float32(0.28)


def _moon(x: Array, y: Array) -> Array:
    """A disc without a smaller disc; beyond the tips, where the two circles meet, the distance is that to the tip."""
    rounding, outer, inner, apart = 0.05, 0.98, 0.8, 0.56
    x, y = x + np.float32(0.14), np.abs(y)
    tip_x = (outer**2 - inner**2 + apart**2) / (2 * apart)
    tip_y = math.sqrt(outer**2 - tip_x**2)
    arcs = np.maximum(np.hypot(x, y) - np.float32(outer), np.float32(inner) - np.hypot(x - np.float32(apart), y))
    # Points to the right of both radii drawn through the tip have no arc before them.
    beyond = (x * tip_y > y * tip_x) & ((x - apart) * tip_y > y * (tip_x - apart))
    return np.where(beyond, np.hypot(x - np.float32(tip_x), y - np.float32(tip_y)), arcs) - np.float32(rounding)


def _heart(x: Array, y: Array) -> Array:
    """A square on its corner with half a disc on each of its upper sides."""
    half = 0.56
    u, v = (x + y - 0.13) / math.sqrt(2), (y - x - 0.13) / math.sqrt(2)  # the square's own axes
    lobes = np.minimum(np.hypot(u, v + half), np.hypot(u + half, v)) - np.float32(half)
    return np.minimum(lobes, _box(u, v, half, half, 0.1))


def _square(x: Array, y: Array) -> Array:
    return _box(x, y, 0.82, 0.82, 0.12)


def _cross(x: Array, y: Array) -> Array:
    return np.minimum(_box(x, y, 0.96, 0.33, 0.1), _box(x, y, 0.33, 0.96, 0.1))


def _box(x: Array, y: Array, half_width: float, half_height: float, rounding: float) -> Array:
    beside, above = np.abs(x) - np.float32(half_width - rounding), np.abs(y) - np.float32(half_height - rounding)
    outside = np.hypot(np.maximum(beside, 0), np.maximum(above, 0))
    return outside + np.minimum(np.maximum(beside, above), 0) - np.float32(rounding)


def _corners(radii: Sequence[float], centre: float = 0.0) -> list[tuple[float, float]]:
    """Corners at equal angles and the given distances from (0, centre), from the top on."""
    turns = [2 * math.pi * k / len(radii) for k in range(len(radii))]
    return [(r * math.sin(turn), centre - r * math.cos(turn)) for r, turn in zip(radii, turns, strict=True)]


def _triangle(x: Array, y: Array) -> Array:
    return _polygon(x, y, _corners([0.98] * 3, centre=0.17), rounding=0.1)


def _star(x: Array, y: Array) -> Array:
    return _polygon(x, y, _corners([1.0, 0.46] * 5, centre=0.06), rounding=0.07)


def _polygon(x: Array, y: Array, corners: list[tuple[float, float]], rounding: float) -> Array:
    """The polygon grown by `rounding`, which rounds its outer corners."""
    nearest = np.full(x.shape, np.inf, dtype=np.float32)
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        wide, high = bx - ax, by - ay
        px, py = x - np.float32(ax), y - np.float32(ay)
        along = np.clip((px * wide + py * high) * (1 / (wide * wide + high * high)), 0, 1)
        nearest = np.minimum(nearest, np.square(px - along * wide) + np.square(py - along * high))
        if high != 0:  # a point is inside when a ray to its right crosses an odd number of edges
            inside ^= ((py >= 0) != (y >= by)) & (px < py * (wide / high))
    distance = np.sqrt(nearest)
    return np.where(inside, -distance, distance) - np.float32(rounding)


OUTLINES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "cross": _cross,
    "ring": _ring,
    "moon": _moon,
}
