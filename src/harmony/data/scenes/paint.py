"""Painting a scene: its ground, then the things with their soft shadows, smallest last."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harmony.data.scenes.grounds import paint_ground, tinted
from harmony.data.scenes.layout import Scene, Thing
from harmony.data.scenes.shapes import OUTLINES
from harmony.data.scenes.words import COLOURS, SHAPES, TEXTURES

Array = NDArray[np.float32]

LIGHT = (-0.6, -0.8)
"""Direction that the light comes from: the upper left."""


@dataclass(frozen=True)
class Picture:
    """A painted scene.

    Attributes:
        pixels: (size, size, 3) uint8.
        mask: (size, size) uint8, 0 where the ground shows and 1 + class index where a thing does; a pixel belongs to the
            thing that covers at least half of it. 255 is never used.
        boxes: (K, 4) float32, left, top, width, height in pixels of the things' masks, in the scene's order.
        labels: (K,) int64, their class indices.
    """

    pixels: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    boxes: Array
    labels: NDArray[np.int64]


def paint(scene: Scene, size: int) -> Picture:
    """Paint a scene with `size` pixels a side."""
    canvas = np.broadcast_to(paint_ground(scene.ground, size, scene.chance), (size, size, 3)).copy()
    mask = np.zeros((size, size), dtype=np.uint8)
    boxes = np.stack([_place(thing, canvas, mask) for thing in scene.things])
    labels = np.array([thing.label for thing in scene.things], dtype=np.int64)
    return Picture((canvas * 255 + 0.5).astype(np.uint8), mask, boxes, labels)


def _place(thing: Thing, canvas: Array, mask: NDArray[np.uint8]) -> Array:
    """Paint one thing and its shadow in place; its box."""
    size = len(canvas)
    radius = thing.radius * size
    reach = 1.5 * radius + 1  # of the shape with its shadow
    left, right = (int(np.clip(thing.x * size + side * reach, 0, size)) for side in (-1, 1))
    top, bottom = (int(np.clip(thing.y * size + side * reach, 0, size)) for side in (-1, 1))
    right, bottom = min(size, right + 1), min(size, bottom + 1)
    x = ((np.arange(left, right, dtype=np.float32) + 0.5) / size - np.float32(thing.x)) / np.float32(thing.radius)
    y = ((np.arange(top, bottom, dtype=np.float32) + 0.5) / size - np.float32(thing.y)) / np.float32(thing.radius)
    patch = canvas[top:bottom, left:right]
    distance = _outline(thing, x, y)
    patch *= 1 - _shadow(thing, x, y)[..., None]
    cover = np.clip(0.5 - distance * radius, 0, 1)
    patch += cover[..., None] * (_surface(thing, x, y, distance, radius) - patch)
    covered = cover >= 0.5
    mask[top:bottom, left:right][covered] = 1 + thing.label
    rows, columns = covered.any(1).nonzero()[0], covered.any(0).nonzero()[0]
    return np.array(
        [left + columns[0], top + rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1], dtype=np.float32
    )


def _turned(thing: Thing, x: Array, y: Array) -> tuple[Array, Array]:
    """The thing's own coordinates (rows, columns) from the picture's x (columns) and y (rows)."""
    cosine, sine = np.float32(math.cos(thing.turn)), np.float32(math.sin(thing.turn))
    return cosine * x[None, :] + sine * y[:, None], cosine * y[:, None] - sine * x[None, :]


def _outline(thing: Thing, x: Array, y: Array) -> Array:
    return OUTLINES[SHAPES[thing.shape]](*_turned(thing, x, y))


def _shadow(thing: Thing, x: Array, y: Array) -> Array:
    """How much light the thing takes from the ground: a blurred copy of it, away from the light."""
    distance = _outline(thing, x + np.float32(0.16 * LIGHT[0]), y + np.float32(0.22 * LIGHT[1]))
    edge = np.clip(0.5 - distance / 0.34, 0, 1)
    return 0.42 * edge * edge * (3 - 2 * edge)


def _surface(thing: Thing, x: Array, y: Array, distance: Array, radius: float) -> Array:
    """The thing's own colours: texture, light from the upper left, and a rounded rim."""
    colour = np.array(list(COLOURS.values())[thing.colour], dtype=np.float32) / 255
    body = tinted(colour, _texture(thing, *_turned(thing, x, y), radius))
    slope_y, slope_x = np.gradient(distance, y, x)
    rim = np.square(np.clip(1 + distance / 0.3, 0, 1))
    facing = (slope_x * LIGHT[0] + slope_y * LIGHT[1]) * rim
    ahead = x[None, :] * LIGHT[0] + y[:, None] * LIGHT[1]
    return tinted_each(body, 0.16 * ahead + 0.28 * facing)


def tinted_each(colours: Array, light: Array) -> Array:
    """As `tinted`, with a colour (..., 3) for each place."""
    return tinted(colours, light)


def _texture(thing: Thing, x: Array, y: Array, radius: float) -> Array:
    """How much lighter or darker than its colour the thing is at its own coordinates."""
    name = TEXTURES[thing.texture]
    light = -0.38 if list(COLOURS)[thing.colour] in ("white", "yellow", "pink") else 0.62
    if name == "solid":
        return np.zeros_like(x)
    if name == "striped":
        cosine, sine = math.cos(3 * thing.grain), math.sin(3 * thing.grain)
        return light * _wave(x * cosine + y * sine, 0.5, thing.grain, radius)
    if name == "checked":
        return light * np.abs(_wave(x, 0.8, 0.25, radius) - _wave(y, 0.8, 0.25, radius))
    if name == "dotted":
        across, along = (np.abs((places / 0.52 + 0.5) % 1 - 0.5) * 0.52 for places in (x, y))
        return light * np.clip(0.5 + (0.16 - np.hypot(across, along)) * radius, 0, 1)
    warped = x + 0.28 * np.sin(4.1 * y + 6 * thing.grain) + 0.12 * np.sin(8.3 * x + 5.2 * y)
    return light * (0.5 + 0.5 * np.sin(7.5 * warped + 6 * thing.grain)) ** 2


def _wave(places: Array, period: float, start: float, radius: float) -> Array:
    """A square wave of 0 and 1, its edges a pixel wide."""
    phase = np.abs((places / period + start) % 1 - 0.5)  # 0 .. 0.5, edges at 0.25
    return np.clip(0.5 + (0.25 - phase) * period * radius, 0, 1)
