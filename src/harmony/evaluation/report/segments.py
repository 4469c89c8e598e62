"""What semantic segmentation shows: images beside the true and the predicted classes of their pixels, and its bars."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from harmony.evaluation.report.charts import Bar
from harmony.evaluation.report.classes import class_bars
from harmony.evaluation.report.html import Html, note, picture, row_of, tag
from harmony.evaluation.report.images import Images
from harmony.evaluation.report.palette import colour, css
from harmony.evaluation.report.pictures import encoded_png, opened_png
from harmony.evaluation.report.probes import training

LARGEST = 288
"""Longer side in px of the images."""

_LEGEND = 40
"""Classes named in the legend; of more, those that cover most of the maps."""


def segments(details: Mapping[str, Any], images: Images) -> list[Html]:
    """Examples with one palette and its legend, and the IoU of every class."""
    names = list(details.get("names") or [one["name"] for one in details.get("classes", [])])
    parts: list[Html] = []
    examples = list(details.get("examples") or [])
    if examples:
        maps = [(opened_png(one["truth"]), opened_png(one["predicted"])) for one in examples]
        rows = [_row(one, *both, images) for one, both in zip(examples, maps, strict=True)]
        says = "Each image, its true classes and what was predicted. Pixels without a class are left blank."
        parts += [tag("h3", "Predicted masks"), tag("p", says, class_="says"), _legend(maps, names)]
        parts += [tag("div", *rows, class_="triples")]
    parts += training(details)
    if details.get("classes"):
        rows_of = [
            Bar(one["name"], one["iou"], _accuracy(one), css(place)) for place, one in enumerate(details["classes"])
        ]
        says = "Intersection over union of each class, and the share of its pixels that were found."
        parts += class_bars("Class by class", says, rows_of)
    return parts


def _accuracy(one: Mapping[str, Any]) -> str:
    return "no pixels" if one.get("accuracy") is None else f"{100 * one['accuracy']:.0f} % found"


def _row(example: Mapping[str, Any], truth: NDArray[Any], predicted: NDArray[Any], images: Images) -> Html:
    shrink = min(1.0, LARGEST / max(example["width"], example["height"]))
    size = max(1, round(example["width"] * shrink)), max(1, round(example["height"] * shrink))
    whole = images.whole(example["position"], *size)
    shown = note("not readable") if whole is None else picture(whole, "image")
    maps = _map(truth, "its true classes"), _map(predicted, "its predicted classes")
    return row_of((shown, "image"), (maps[0], "truth"), (maps[1], "predicted"))


def _map(classes: NDArray[Any], alt: str) -> Html:
    return picture(painted(classes), alt, class_="map")


def painted(classes: NDArray[Any]) -> str:
    """(H, W) class indices as a PNG in the classes' colours; 255, no class, is transparent."""
    image = Image.fromarray(classes.astype(np.uint8), "P")
    image.putpalette([value for index in range(256) for value in colour(index)])
    return encoded_png(image, transparency=255)


def _legend(maps: Sequence[tuple[NDArray[Any], NDArray[Any]]], names: Sequence[str]) -> Html:
    """The classes that the maps show, those that cover most first."""
    counts = np.zeros(256, dtype=np.int64)
    for both in maps:
        for classes in both:
            counts += np.bincount(classes.ravel(), minlength=256)[:256]
    seen = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index] and index < len(names)]
    keys = [
        tag("span", tag("i", style=f"background:{css(index)}"), names[index], class_="swatch")
        for index in seen[:_LEGEND]
    ]
    if len(seen) > _LEGEND:
        keys.append(tag("span", f"and {len(seen) - _LEGEND} more", class_="swatch"))
    return tag("div", *keys, class_="swatches")
