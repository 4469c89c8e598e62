"""The backgrounds, painted as (3, size, size) float32 with values about 0 to 1.

Noise is drawn on grids of fixed size and stretched, so that a scene looks the same at any size.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from harmony.chance import Chance
from harmony.data.scenes.layout import Ground
from harmony.data.scenes.shapes import Array
from harmony.data.scenes.words import TONES


def paint_ground(ground: Ground, size: int, chance: Chance) -> Array:
    """The background of a scene, (3, size, size)."""
    light = PAINTERS[ground.kind](size, ground.direction, chance)
    return tinted(rgb(TONES[ground.tone]), np.broadcast_to(light, (size, size)))


def rgb(colour: tuple[int, int, int]) -> Array:
    """(3, 1, 1) in [0, 1]."""
    return np.array(colour, dtype=np.float32).reshape(3, 1, 1) / 255


def tinted(colour: Array, light: Array) -> Array:
    """Colours (3, ...) made lighter, towards white, where `light` (...) is above zero, and darker where it is below."""
    return colour + np.maximum(light, 0) * (1 - colour) + np.minimum(light, 0) * colour


def _axes(size: int) -> tuple[Array, Array]:
    """x (1, size) and y (size, 1) of the pixels' centres as shares of the side."""
    places = (np.arange(size, dtype=np.float32) + 0.5) / size
    return places[None, :], places[:, None]


def _noise(chance: Chance, name: str, rows: int, columns: int, size: int) -> Array:
    """Smooth noise, about -1 .. 1, from a grid of rows x columns numbers stretched to (size, size)."""
    grid = chance.uniform(f"ground/{name}", rows, columns)[0].numpy() * 2 - 1
    return np.asarray(Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC))


def _along(size: int, direction: float) -> Array:
    """-1 .. 1 across the picture in a direction."""
    x, y = _axes(size)
    dx, dy = math.cos(direction), math.sin(direction)
    return ((2 * x - 1) * dx + (2 * y - 1) * dy) / (abs(dx) + abs(dy))


def _plain(size: int, direction: float, chance: Chance) -> Array:
    return 0.05 * _along(size, direction)


def _gradient(size: int, direction: float, chance: Chance) -> Array:
    return 0.52 * _along(size, direction)


def _clouds(size: int, direction: float, chance: Chance) -> Array:
    noise = _noise(chance, "coarse", 5, 4, size) + 0.5 * _noise(chance, "fine", 10, 8, size)
    noise += 0.22 * _noise(chance, "finest", 21, 17, size)
    return 0.72 / (1 + np.exp(0.3 - 4.5 * noise)) - 0.06


def _grass(size: int, direction: float, chance: Chance) -> Array:
    blades = _noise(chance, "blades", 9, 56, size) + 0.6 * _noise(chance, "tufts", 22, 40, size)
    _, y = _axes(size)
    return 0.24 * blades * (0.55 + 0.6 * y) + 0.16 * (y - 0.6)


def _tiles(size: int, direction: float, chance: Chance) -> Array:
    count = 5
    x, y = _axes(size)
    shade = chance.uniform("ground/tiles", count, count)[0].numpy() * 0.22 - 0.11
    column, row = (np.minimum((places * count).astype(int), count - 1) for places in (x, y))
    gap = np.minimum(_to_line(x, count), _to_line(y, count)) * size  # pixels to the nearest joint
    width = max(0.5, 0.006 * size)
    joint = np.clip(width + 0.5 - gap, 0, 1)
    return (shade[row, column] + 0.05 * (2 - x - y) - 0.05) * (1 - joint) - 0.34 * joint


def _to_line(places: Array, count: int) -> Array:
    """Distance to the nearest of the lines that part the side into `count`."""
    return np.abs(places - np.round(places * count) / count)


def _planks(size: int, direction: float, chance: Chance) -> Array:
    count = 6
    _, y = _axes(size)
    shade = chance.uniform("ground/planks", count)[0].numpy() * 0.24 - 0.12
    row = np.minimum((y * count).astype(int), count - 1)
    streaks = _noise(chance, "streaks", 72, 5, size)
    joint = np.clip(max(0.5, 0.006 * size) + 0.5 - _to_line(y, count) * size, 0, 1)
    return (shade[row] + 0.12 * streaks) * (1 - joint) - 0.42 * joint


PAINTERS: dict[str, Callable[[int, float, Chance], Array]] = {
    "plain": _plain,
    "gradient": _gradient,
    "clouds": _clouds,
    "grass": _grass,
    "tiles": _tiles,
    "planks": _planks,
}
"""How light or dark each kind of ground is, (size, size) or what broadcasts to it, from -1 (black) to 1 (white)."""
