"""COCO json files as flat arrays: images, things, captions (cocodataset.org, "Data format")."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from harmony.data.sources.coco_outlines import Outlines
from harmony.data.sources.flat import Strings
from harmony.data.sources.noted import Noted
from harmony.errors import UserError

_OUTSIDE = 1.0
"""Pixels that a box may reach beyond its image without being counted: rounding does as much."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@dataclass(frozen=True)
class Listed:
    """The images that a file lists, N of them, each once.

    Attributes:
        ids: (N,) int64.
        names: their files' names.
        sizes: (N, 2) int32, width and height; 0 where the file does not say.
    """

    ids: NDArray[np.int64]
    names: list[str]
    sizes: NDArray[np.int32]


@dataclass(frozen=True)
class Things:
    """Everything on N images, A things in the order of the images; fields as in `Objects`.

    Attributes:
        ends: (N,) int64, where each image's things end.
    """

    ends: NDArray[np.int64]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    areas: NDArray[np.float32]
    outlines: Outlines


def load(path: Path, uri: str) -> dict[str, Any]:
    """The file's content, with lists under "images" and "annotations".

    Raises:
        UserError: it is no json, or no COCO file of instances or captions.
    """
    if not path.is_file():
        raise UserError(f"{uri} names no file: {path} is not there; correct the path")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no json ({error}); give a COCO annotation file") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is no COCO file: it holds a {type(value).__name__} in place of an object")
    for name in ("images", "annotations"):
        if not isinstance(value.get(name), list):
            seen = ", ".join(list(value)[:8]) or "nothing"
            raise UserError(f"{path} is no COCO file: it has no list {name!r}, saw {seen}; give instances or captions")
        if not all(isinstance(one, dict) for one in value[name]):
            raise UserError(f"{path} is no COCO file: its {name} are not objects")
    if any("segments_info" in one for one in value["annotations"][:1]):
        raise UserError(f"{path} holds panoptic segments; give the instances file of the same images")
    return value


def holds_captions(content: Mapping[str, Any]) -> bool:
    """Whether a file's annotations are captions and not things."""
    return any("caption" in one for one in content["annotations"])


def images_of(content: Mapping[str, Any], path: Path, noted: Noted) -> Listed:
    """The images of a file; an image that is listed twice alike counts once.

    Raises:
        UserError: an image without id or file name, two images with one id, or no image.
    """
    names: dict[int, str] = {}
    sizes: dict[int, tuple[int, int]] = {}
    for place, image in enumerate(content["images"]):
        number, name = image.get("id"), image.get("file_name")
        if not _is_whole(number):
            raise UserError(f"{path}: image {place} has the id {number!r}; COCO ids are whole numbers")
        if not isinstance(name, str) or not name:
            raise UserError(f"{path}: the image with the id {number} has no file_name; add it")
        if number in names:
            if names[number] != name:
                raise UserError(
                    f"{path} has two images with the id {number}, {names[number]} and {name}, so that nobody can tell "
                    "whose annotations are whose; give every image its own id"
                )
            noted.add("images that are listed twice (used once)", name)
            continue
        names[number] = name
        sizes[number] = (_side(image.get("width")), _side(image.get("height")))
    if not names:
        raise UserError(f"{path} lists no images; give another file")
    return Listed(
        np.array(list(names), dtype=np.int64), list(names.values()), np.array(list(sizes.values()), dtype=np.int32)
    )


def categories_of(content: Mapping[str, Any], path: Path) -> dict[int, str]:
    """Category id -> name, in the order of the ids.

    Raises:
        UserError: there are none, or two have the same id.
    """
    names: dict[int, str] = {}
    for category in content.get("categories") or []:
        number = category.get("id") if isinstance(category, dict) else None
        if not _is_whole(number):
            raise UserError(f"{path} has a category with the id {number!r}; COCO ids are whole numbers")
        name = str(category.get("name", f"category {number}"))
        if names.setdefault(number, name) != name:
            raise UserError(f"{path} has two categories with the id {number}, {names[number]} and {name}; correct it")
    if not names:
        raise UserError(f"{path} has no list 'categories', so its things have no names; add it")
    return dict(sorted(names.items()))


def things_of(
    content: Mapping[str, Any], images: Listed, kept: NDArray[np.bool_], labels: Mapping[int, int], noted: Noted
) -> Things:
    """The things on the images that are `kept`, (N,) bool, by image.

    What cannot be used is left out and counted: things of images or categories that are not listed, boxes without
    area, and things written twice. Two things that merely share an id are both used: nothing here refers to the ids.
    """
    places = {int(number): place for place, number in enumerate(images.ids)}
    row_of, keeps, sizes = (np.cumsum(kept) - 1).tolist(), kept.tolist(), images.sizes.tolist()
    rows: list[tuple[int, dict[str, Any], Box]] = []
    seen: dict[Any, tuple[Any, ...]] = {}
    for number, thing in enumerate(content["annotations"]):
        name = f"annotation {thing.get('id', number)}"
        place, category = _place(thing, places), thing.get("category_id")
        if place is None:
            noted.add("annotations of images that are not listed (left out)", name)
        elif not _is_whole(category) or category not in labels:
            noted.add("annotations of categories that are not listed (left out)", name)
        elif keeps[place] and not _is_repeated(thing, seen, noted, name):
            box = _box(thing.get("bbox"), sizes[place], noted, name)
            if box is not None:
                rows.append((place, thing, box))
    rows.sort(key=lambda row: row[0])
    outlines = Outlines((_outline(thing, sizes[place]) for place, thing, _ in rows), noted)
    count = int(kept.sum())
    counts = np.bincount([row_of[place] for place, _, _ in rows], minlength=count) if rows else np.zeros(count)
    boxes = np.array([box for _, _, box in rows], dtype=np.float32).reshape(-1, 4)
    return Things(
        ends=np.cumsum(counts, dtype=np.int64),
        boxes=boxes,
        labels=np.array([labels[thing["category_id"]] for _, thing, _ in rows], dtype=np.int64),
        crowd=np.array([bool(thing.get("iscrowd")) for _, thing, _ in rows], dtype=bool),
        areas=np.array([_area(thing, box) for _, thing, box in rows], dtype=np.float32),
        outlines=outlines,
    )


def captions_of(
    content: Mapping[str, Any], images: Listed, kept: NDArray[np.bool_], noted: Noted
) -> tuple[Strings, NDArray[np.int64]]:
    """The captions of the images that are `kept`, end to end, and where each image's end."""
    places = {int(number): place for place, number in enumerate(images.ids)}
    each: list[list[str]] = [[] for _ in images.names]
    for number, one in enumerate(content["annotations"]):
        place, caption = _place(one, places), one.get("caption")
        if place is None:
            noted.add("captions of images that are not listed (left out)", f"annotation {one.get('id', number)}")
        elif not isinstance(caption, str) or not caption.strip():
            noted.add("captions without a word (left out)", f"annotation {one.get('id', number)}")
        else:
            each[place].append(" ".join(caption.split()))
    chosen = [captions for captions, keep in zip(each, kept, strict=True) if keep]
    ends = np.cumsum([len(captions) for captions in chosen], dtype=np.int64)
    return Strings.of([caption for captions in chosen for caption in captions]), ends


def _is_repeated(thing: Mapping[str, Any], seen: dict[Any, tuple[Any, ...]], noted: Noted, name: str) -> bool:
    """Whether the very same thing stood before; a shared id alone is counted only."""
    number = thing.get("id")
    if not _is_whole(number):
        return False
    same = (thing["image_id"], thing["category_id"], thing.get("bbox"))
    before = seen.setdefault(number, same)
    if before is same:
        return False
    if before == same:
        noted.add("things that are written twice (used once)", name)
        return True
    noted.add("annotation ids that several things share (all are used)", name)
    return False


def _box(written: Any, size: Sequence[int], noted: Noted, name: str) -> Box | None:
    """Left, top, right, bottom within the image; None, and counted, where nothing is left."""
    numbers = isinstance(written, list) and len(written) == 4 and all(isinstance(side, int | float) for side in written)
    if not numbers or not all(math.isfinite(side) for side in written):
        noted.add("boxes that are not four numbers (left out)", name)
        return None
    left, top, width, height = (float(side) for side in written)
    if width <= 0 or height <= 0:
        noted.add("boxes without area (left out)", name)
        return None
    right, bottom = left + width, top + height
    # Plain numbers: arrays of four would take most of the time that opening a large file takes.
    box = (max(left, 0.0), max(top, 0.0), min(right, size[0] or math.inf), min(bottom, size[1] or math.inf))
    if box[2] <= box[0] or box[3] <= box[1]:
        noted.add("boxes outside the image (left out)", name)
        return None
    if max(-left, -top, right - box[2], bottom - box[3]) > _OUTSIDE:
        noted.add("boxes that reach beyond the image (clipped)", name)
    return box


def _outline(thing: Mapping[str, Any], size: Sequence[int]) -> tuple[Any, int, int, str]:
    return thing.get("segmentation"), size[0], size[1], f"annotation {thing.get('id')}"


def _area(thing: Mapping[str, Any], box: Box) -> float:
    """The area that the file gives, or else the box's."""
    area = thing.get("area")
    if isinstance(area, int | float) and math.isfinite(area) and area > 0:
        return float(area)
    return float((box[2] - box[0]) * (box[3] - box[1]))


def _place(annotation: Mapping[str, Any], places: Mapping[int, int]) -> int | None:
    number = annotation.get("image_id")
    return places.get(number) if _is_whole(number) else None


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _side(value: Any) -> int:
    return value if _is_whole(value) and 0 < value < 2**31 else 0
