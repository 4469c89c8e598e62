"""What detection shows: boxes and masks over images, true and predicted, and the average precision of every class."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from harmony.evaluation.report.charts import LETTER, Bar
from harmony.evaluation.report.classes import class_bars
from harmony.evaluation.report.html import Html, note, picture, tag
from harmony.evaluation.report.images import Images
from harmony.evaluation.report.palette import colour, css, is_light
from harmony.evaluation.report.pictures import encoded_png, opened_png
from harmony.evaluation.report.probes import training

SURE = 0.3
"""Predictions with a lower score are not drawn."""

_LONGEST = 448
"""Longer side in px of the images."""

_DRAWN = 320
"""Width of a drawing in its own units, which are about px on the page."""

_OPAQUE = 120
"""Of 255, how much of the image a mask covers."""


def boxes(details: Mapping[str, Any], images: Images) -> list[Html]:
    """Examples with the truth on the left and the predictions on the right, and bars of every class."""
    names = list(details.get("names") or [one["name"] for one in details.get("classes", [])])
    parts: list[Html] = []
    examples = list(details.get("examples") or [])
    if examples:
        pairs = [_pair(one, names, images) for one in examples]
        says = (
            f"The true boxes, and beside them the predicted ones with a score of at least {SURE:g}; "
            "masks are filled in where the data have them."
        )
        parts += [tag("h3", "Predicted boxes"), tag("p", says, class_="says"), tag("div", *pairs, class_="scenes")]
    parts += training(details)
    if details.get("classes"):
        rows = [
            Bar(one["name"], one["box_ap"], _remark(one), css(place)) for place, one in enumerate(details["classes"])
        ]
        says = "Average precision of each class's boxes" + (
            ", and of its masks." if any(one.get("mask_ap") is not None for one in details["classes"]) else "."
        )
        parts += class_bars("Class by class", says, rows)
    return parts


def _remark(one: Mapping[str, Any]) -> str:
    mask = one.get("mask_ap")
    return f"of {one['instances']:,}" if mask is None else f"masks {100 * mask:.0f} %"


def _pair(example: Mapping[str, Any], names: Sequence[str], images: Images) -> Html:
    shrink = min(1.0, _LONGEST / max(example["width"], example["height"]))
    size = max(1, round(example["width"] * shrink)), max(1, round(example["height"] * shrink))
    whole = images.whole(example["position"], *size)
    if whole is None:
        return tag("div", note("not readable"), class_="pair")
    truth, predicted = list(example.get("truth") or []), list(example.get("predicted") or [])
    mask = opened_png(example["predicted_mask"]) if example.get("predicted_mask") else None
    left = _scene(whole, example, truth, [1.0] * len(truth), None, names, "true boxes")
    right = _scene(whole, example, predicted, [one["score"] for one in predicted], mask, names, "predicted boxes")
    return tag("div", left, right, class_="pair")


def _scene(
    whole: str,
    example: Mapping[str, Any],
    things: Sequence[Mapping[str, Any]],
    scores: Sequence[float],
    mask: NDArray[Any] | None,
    names: Sequence[str],
    alt: str,
) -> Html:
    """The image with a drawing over it, whose units are such that strokes and letters are of equal size in all."""
    scale = _DRAWN / example["width"]
    height = example["height"] * scale
    kept = [place for place, score in enumerate(scores) if score >= SURE]
    over: list[Html] = []
    if mask is not None:
        filled = tinted(mask, [(place, things[place]["label"]) for place in kept])
        over.append(tag("image", href=filled, width=_DRAWN, height=f"{height:.1f}", preserveAspectRatio="none"))
    outlines, labels = [], []
    for place in reversed(kept):  # the surest is drawn last, over the others
        thing = things[place]
        name = names[thing["label"]] if thing["label"] < len(names) else f"class {thing['label']}"
        text = f"{name} {thing['score']:.2f}" if "score" in thing else name
        box = [value * scale for value in thing["box"]]
        outlines.append(_outline(box, css(thing["label"])))
        labels.append(_label(box, text, thing["label"], height))
    drawing = tag("svg", *over, *outlines, *labels, viewBox=f"0 0 {_DRAWN} {height:.1f}", role="img", aria_label=alt)
    return tag("div", picture(whole, "image"), drawing, class_="scene")


def _outline(box: Sequence[float], stroke: str) -> Html:
    left, top, right, bottom = box
    return tag(
        "rect",
        x=f"{left:.1f}",
        y=f"{top:.1f}",
        width=f"{max(right - left, 0):.1f}",
        height=f"{max(bottom - top, 0):.1f}",
        rx=2,
        class_="box",
        style=f"stroke:{stroke}",
    )


def _label(box: Sequence[float], text: str, label: int, height: float) -> Html:
    """The name on a small plate: above the box where there is room, else within it; never beyond the image."""
    width = LETTER * len(text) + 8
    left = min(max(box[0], 0), _DRAWN - width) if width < _DRAWN else 0
    top = box[1] - 14 if box[1] >= 14 else min(max(box[1], 0), height - 14)
    place = {"x": f"{left:.1f}", "y": f"{top:.1f}", "width": f"{width:.1f}", "height": 14}
    plate = tag("rect", **place, rx=2, style=f"fill:{css(label)}")
    ink = "dark" if is_light(label) else "light"
    words = tag("text", text, x=f"{left + 4:.1f}", y=f"{top + 10.5:.1f}", class_=f"plate {ink}")
    return tag("g", plate, words)


def tinted(mask: NDArray[Any], instances: Sequence[tuple[int, int]]) -> str:
    """(H, W) of 1 + instance as a PNG with each instance in its class's colour and everything else transparent.

    Args:
        mask: 0 where there is nothing.
        instances: (instance, class) of those to paint.
    """
    table = np.zeros((256, 4), dtype=np.uint8)
    for instance, label in instances:
        if instance < 255:
            table[instance + 1] = (*colour(label), _OPAQUE)
    return encoded_png(Image.fromarray(table[mask], "RGBA"))
