"""What the report shows of detection."""

import base64
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from harmony.evaluation.crops import spread
from harmony.evaluation.detection.evaluator import Page, Precision, decoded

EXAMPLES = 6
"""Images that the report shows."""

SHOWN_SCORE = 0.3
"""Things found with less are shown only where nothing scores as much, and then the best few."""

BEST = 10
"""How many those are."""

LONGEST = 256
"""Longer side in px of a mask in the report."""


def details_of(pages: list[Page], names: list[str], boxes: Precision, masks: Precision | None) -> dict[str, Any]:
    """Each class's AP, and some images with what is on them and what was found."""
    instances = [0] * len(names)
    for page in pages:
        for thing in page.truth:
            if not thing["iscrowd"]:
                instances[thing["category_id"]] += 1
    mask_ap: Sequence[float | None] = [None] * len(names) if masks is None else masks.classes
    return {
        "names": names,
        "classes": [
            {"name": name, "instances": count, "box_ap": box, "mask_ap": mask}
            for name, count, box, mask in zip(names, instances, boxes.classes, mask_ap, strict=True)
        ],
        "examples": [_example(pages[place]) for place in spread(len(pages), EXAMPLES)],
    }


def _example(page: Page) -> dict[str, Any]:
    shown = [thing for thing in page.found if thing["score"] >= SHOWN_SCORE] or page.found[:BEST]
    return {
        "position": page.position,
        "width": page.width,
        "height": page.height,
        "predicted": [
            {"box": _corners(thing["bbox"]), "label": thing["category_id"], "score": round(thing["score"], 4)}
            for thing in shown
        ],
        "truth": [{"box": _corners(thing["bbox"]), "label": thing["category_id"]} for thing in page.truth],
        "predicted_mask": _picture(page, shown),
    }


def _picture(page: Page, shown: list[dict[str, Any]]) -> str | None:
    """A PNG whose pixels are 0, or 1 + the place of the thing shown there, the best on top; base64."""
    if not shown or "segmentation" not in shown[0]:
        return None
    of_thing = np.zeros((page.height, page.width), dtype=np.uint8)
    for place in reversed(range(min(len(shown), 255))):
        of_thing[decoded(shown[place]["segmentation"]) > 0] = place + 1
    picture, file = Image.fromarray(of_thing), BytesIO()
    if max(picture.size) > LONGEST:
        factor = LONGEST / max(picture.size)
        picture = picture.resize([max(1, round(side * factor)) for side in picture.size], Image.Resampling.NEAREST)
    picture.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _corners(box: Sequence[float]) -> list[float]:
    """Left, top, width, height -> left, top, right, bottom."""
    left, top, width, height = box
    return [round(side, 2) for side in (left, top, left + width, top + height)]
