"""The outlines of things in COCO files, polygons and run lengths, kept flat and drawn when masks are asked for.

Format: cocodataset.org, "Data format"; a polygon is [x1, y1, x2, y2, ...], a region {"size": [H, W], "counts": ...}
with counts as a list or as compressed text. Both are drawn by faster-coco-eval.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle
from numpy.typing import NDArray

from harmony.data.sources.flat import Strings
from harmony.data.sources.noted import Noted

Outline = bytes | list[NDArray[np.float64]] | None
"""Compressed run lengths, polygons of (2 P,) coordinates, or nothing."""

_FAR = 16
"""Polygons that reach further than this many sides of the image are no polygons; drawing them would take memory."""


class Outlines:
    """The outlines of A things.

    Args:
        given: (segmentation as the file has it, width and height of the image, name of the thing) of each.
        noted: where outlines that are none are counted.

    Attributes:
        any: whether some thing has one.
    """

    def __init__(self, given: Iterable[tuple[Any, int, int, str]], noted: Noted) -> None:
        coordinates: list[NDArray[np.float64]] = []
        runs: list[bytes] = []
        polygons_each: list[int] = []
        without = ""
        missing = 0
        for segmentation, width, height, name in given:
            polygons, counts = _parsed(segmentation, width, height)
            if segmentation and not polygons and not counts:
                noted.add("outlines that are no polygon and no run lengths of their image (the box serves)", name)
            elif not segmentation:
                without, missing = without or name, missing + 1
            coordinates += polygons
            runs.append(counts)
            polygons_each.append(len(polygons))
        self._coordinates = np.concatenate(coordinates) if coordinates else np.zeros(0)
        self._polygon_ends = np.cumsum([len(polygon) for polygon in coordinates], dtype=np.int64)
        self._ends = np.cumsum(polygons_each, dtype=np.int64)
        self._runs = Strings.of_bytes(runs)
        self.any = bool(coordinates) or any(runs)
        if self.any and missing:
            noted.add("things without an outline among others with one (the box serves)", without, missing)

    def __getitem__(self, thing: int) -> Outline:
        first, end = int(self._ends[thing - 1]) if thing else 0, int(self._ends[thing])
        if end > first:
            starts = [int(self._polygon_ends[i - 1]) if i else 0 for i in range(first, end)]
            ends = self._polygon_ends[first:end]
            return [self._coordinates[a:b] for a, b in zip(starts, ends, strict=True)]
        return self._runs.bytes_at(thing) or None


def drawn(outlines: list[Outline], boxes: NDArray[np.float32], width: int, height: int) -> NDArray[np.bool_]:
    """(K, height, width), the pixels of each thing; those of its box where it has no outline."""
    masks = np.zeros((len(outlines), height, width), dtype=bool)
    for mask, outline, box in zip(masks, outlines, boxes, strict=True):
        if outline is None:
            left, top, right, bottom = (int(side) for side in (*np.floor(box[:2]), *np.ceil(box[2:])))
            mask[top:bottom, left:right] = True
        else:
            mask[:] = _pixels(outline, width, height)
    return masks


def _pixels(outline: bytes | list[NDArray[np.float64]], width: int, height: int) -> NDArray[np.uint8]:
    if isinstance(outline, bytes):
        region = {"size": [height, width], "counts": outline}
    else:
        region = rle.merge(rle.frPyObjects([polygon.tolist() for polygon in outline], height, width))
    pixels: NDArray[np.uint8] = rle.decode(region)
    return pixels


def _parsed(segmentation: Any, width: int, height: int) -> tuple[list[NDArray[np.float64]], bytes]:
    """The polygons, or the compressed run lengths, in what a file has; neither when it is neither."""
    if isinstance(segmentation, list):
        reach = _FAR * max(width, height)
        polygons = (_polygon(one, reach) for one in segmentation)
        return [polygon for polygon in polygons if polygon is not None], b""
    if not isinstance(segmentation, dict) or segmentation.get("size") != [height, width]:
        return [], b""
    counts = segmentation.get("counts")
    try:
        if isinstance(counts, list):
            if sum(counts) != height * width or min(counts) < 0:
                return [], b""
            return [], bytes(rle.frPyObjects(segmentation, height, width)["counts"])
        encoded = counts.encode("ascii") if isinstance(counts, str) else b""
        if encoded:
            rle.decode({"size": [height, width], "counts": encoded})
    except (ValueError, RuntimeError, TypeError):  # what the library raises for counts that are none
        return [], b""
    return [], encoded


def _polygon(one: Any, reach: float) -> NDArray[np.float64] | None:
    """Coordinates of at least three points near the image; anything else would crash or confuse what draws it."""
    if not isinstance(one, list) or len(one) < 6 or len(one) % 2:
        return None
    try:
        numbers = np.array(one)
    except ValueError:  # lists of several lengths
        return None
    if numbers.ndim != 1 or numbers.dtype.kind not in "iuf" or not np.abs(numbers).max() <= reach:  # nan is not either
        return None
    return numbers.astype(np.float64)
