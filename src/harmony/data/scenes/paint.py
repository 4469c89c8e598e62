"""Painting a scene: its ground, then the things with their soft shadows, smallest last."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harmony.data.scenes.grounds import paint_ground, rgb, tinted
from harmony.data.scenes.layout import Scene, Thing
from harmony.data.scenes.shapes import OUTLINES, Array
from harmony.data.scenes.words import COLOURS, SHAPES, TEXTURES

LIGHT = (-0.11, -0.17)
"""A step towards the light, which comes from the upper left, in units of a thing's radius."""


@dataclass(frozen=True)
class Picture:
    """A painted scene.

    Attributes:
        pixels: (size, size, 3) uint8.
        mask: (size, size) uint8, 0 where the ground shows and 1 + class index where a thing does; a pixel belongs to
            the thing that covers at least half of it. 255 is never used.
        boxes: (K, 4) float32, left, top, width, height in pixels of the things' masks, in the scene's order.
        labels: (K,) int64, their class indices.
    """

    pixels: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]


def paint(scene: Scene, size: int) -> Picture:
    """Paint a scene with `size` pixels a side."""
    canvas = paint_ground(scene.ground, size, scene.chance)
    mask = np.zeros((size, size), dtype=np.uint8)
    boxes = np.stack([_place(thing, canvas, mask) for thing in scene.things])
    labels = np.array([thing.label for thing in scene.things], dtype=np.int64)
    pixels = (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
    return Picture(np.ascontiguousarray(pixels.transpose(1, 2, 0)), mask, boxes, labels)


def _place(thing: Thing, canvas: Array, mask: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Paint one thing and its shadow in place; its box."""
    size = len(mask)
    left, x = _pixels(thing.x, thing.radius, size)
    top, y = _pixels(thing.y, thing.radius, size)
    window = (slice(top, top + len(y)), slice(left, left + len(x)))
    place = _turned(thing, x, y)
    distance = OUTLINES[SHAPES[thing.shape]](*place)
    # The same outline a little nearer to the light: where it covers a point, the thing's shadow falls on that point.
    nearer = OUTLINES[SHAPES[thing.shape]](*_turned(thing, x + LIGHT[0], y + LIGHT[1]))
    patch = canvas[:, *window]
    patch *= 1 - _shadow(nearer)
    cover = np.clip(0.5 - distance * (thing.radius * size), 0, 1)
    sheen = x[None, :] * LIGHT[0] + y[:, None] * LIGHT[1]
    patch += cover * (tinted(_body(thing, place, size), 0.6 * sheen + _rim(distance, nearer)) - patch)
    covered = cover >= 0.5
    mask[window][covered] = 1 + thing.label
    rows, columns = covered.any(1).nonzero()[0], covered.any(0).nonzero()[0]
    sides = (left + columns[0], top + rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)
    return np.array(sides, dtype=np.float32)


def _pixels(centre: float, radius: float, size: int) -> tuple[int, Array]:
    """The pixels along one axis that a thing or its shadow may touch: the first one, and all in units of the radius."""
    first, last = (centre - 1.2 * radius) * size - 1, (centre + 1.6 * radius) * size + 1
    pixels = np.arange(max(0, int(first)), min(size, int(last) + 1), dtype=np.float32)
    return int(pixels[0]), ((pixels + 0.5) / size - centre) / radius


def _turned(thing: Thing, x: Array, y: Array) -> tuple[Array, Array]:
    """The thing's own coordinates, (rows, columns) each, from the picture's x (columns) and y (rows)."""
    cosine, sine = math.cos(thing.turn), math.sin(thing.turn)
    return cosine * x[None, :] + sine * y[:, None], cosine * y[:, None] - sine * x[None, :]


def _shadow(nearer: Array) -> Array:
    """The share of its light that the ground loses, with soft edges."""
    edge = np.clip(0.5 - nearer * 3, 0, 1)
    return 0.42 * edge * edge * (3 - 2 * edge)


def _rim(distance: Array, nearer: Array) -> Array:
    """How much lighter the rounded edge is on the side of the light, and darker on the other."""
    rim = np.clip(1 + distance * 3, 0, 1)
    return (nearer - distance) * rim * rim


def _body(thing: Thing, place: tuple[Array, Array], size: int) -> Array:
    """The thing's own colours before they are lit, (3, ...)."""
    colour, second = (rgb(paint) for paint in list(COLOURS.values())[thing.colour])
    share = _texture(TEXTURES[thing.texture], thing.grain, *place, thing.radius * size)
    return colour if share is None else colour + share * (second - colour)


def _texture(name: str, grain: float, x: Array, y: Array, radius: float) -> Array | None:
    """How much of the second colour there is at a thing's own coordinates; None for none."""
    if name == "striped":
        return _wave(x * math.cos(3 * grain) + y * math.sin(3 * grain), 0.5, grain, radius)
    if name == "checked":
        return np.abs(_wave(x, 0.8, 0.25, radius) - _wave(y, 0.8, 0.25, radius))
    if name == "dotted":
        across, along = (np.abs((places / 0.5 + 0.5) % 1 - 0.5) * 0.5 for places in (x, y))
        return np.clip(0.5 + (0.155 - np.hypot(across, along)) * radius, 0, 1)
    if name == "marbled":
        veins = np.sin(7 * x + 2.2 * np.sin(4 * y + 6 * grain) + np.sin(8 * x + 5 * y) + 6 * grain)
        return np.square(0.5 + 0.5 * veins)
    return None


def _wave(places: Array, period: float, start: float, radius: float) -> Array:
    """A square wave of 0 and 1, its edges a pixel wide."""
    phase = np.abs((places / period + start) % 1 - 0.5)  # 0 to 0.5, the edges at 0.25
    return np.clip(0.5 + (0.25 - phase) * (period * radius), 0, 1)
