"""Average precision as COCO defines it, by faster-coco-eval, in memory."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as run_lengths
from numpy.typing import NDArray

NUMBERS = {"ap": 0, "ap50": 1, "ap75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5, "ar100": 8}
"""Our names of COCO's numbers, and their places among its twelve."""


@dataclass
class Page:
    """One image: what is on it and what was found on it, as COCO writes them (boxes left, top, width, height).

    Attributes:
        position: in the source; the image's id.
        height, width: px.
        truth: {category_id, bbox, area, iscrowd, segmentation or not}.
        found: {category_id, bbox, score, segmentation or not}, best first.
        empty: boxes without an area that were left out of the truth.
    """

    position: int
    height: int
    width: int
    truth: list[dict[str, Any]] = field(default_factory=list)
    found: list[dict[str, Any]] = field(default_factory=list)
    empty: int = 0


@dataclass(frozen=True)
class Precision:
    """COCO's numbers, those that exist, and the AP of each class (None without a thing of it)."""

    numbers: dict[str, float]
    classes: list[float | None]


def encoded(mask: NDArray[np.uint8]) -> dict[str, Any]:
    """(H, W) uint8, 0 or 1 -> run lengths."""
    runs: dict[str, Any] = run_lengths.encode(np.asfortranarray(mask))
    return runs


def decoded(runs: dict[str, Any]) -> NDArray[np.uint8]:
    """The inverse of `encoded`."""
    mask: NDArray[np.uint8] = run_lengths.decode(runs)
    return mask


def evaluate(pages: list[Page], names: list[str], masks: bool) -> Precision:
    """Average precision of boxes, or of masks.

    Args:
        pages: all images.
        names: of the classes.
        masks: whether masks are compared, or boxes.
    """
    evaluator = COCOeval_faster(*_as_coco(pages, names, masks), "segm" if masks else "bbox", print_function=_silent)
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    stats = [float(number) for number in evaluator.stats[:12]]
    precision = evaluator.eval["precision"][:, :, :, 0, -1]  # IoU, recall, class; all areas, most detections
    each = [precision[:, :, place] for place in range(len(names))]
    return Precision(
        # COCO writes -1 where there is nothing to find.
        {name: stats[place] for name, place in NUMBERS.items() if stats[place] >= 0},
        [float(own[own > -1].mean()) if (own > -1).any() else None for own in each],
    )


def _as_coco(pages: list[Page], names: list[str], masks: bool) -> tuple[COCO, COCO]:
    truth = [thing | {"image_id": page.position} for page in pages for thing in page.truth]
    data = {
        "images": [{"id": page.position, "height": page.height, "width": page.width} for page in pages],
        "categories": [{"id": place, "name": name} for place, name in enumerate(names)],
        # From 1, since an evaluator may take the id 0 for no match.
        "annotations": [thing | {"id": number} for number, thing in enumerate(truth, 1)],
    }
    # Of masks the evaluator is to take the area of the mask, which it does where it sees no box.
    left_out = "bbox" if masks else "segmentation"
    found = [
        {key: value for key, value in thing.items() if key != left_out} | {"image_id": page.position}
        for page in pages
        for thing in page.found
    ]
    known = COCO(data)
    return known, known.loadRes(found)


def _silent(*words: object) -> None:
    """Print nothing."""
