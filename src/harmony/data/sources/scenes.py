"""Generated scenes: coloured, textured shapes on varied grounds, with captions, class, mask and boxes; no files.

    scenes:                                  the training split, 64 pixels a side
    scenes:held_out?count=512&size=96        things whose shape, colour and texture never come together in training
    scenes:val?seed=3                        new scenes of combinations that training does show
    scenes:train?things=shape                pixels and things are classed by shape alone (or by colour), not by both

Scene i is a function of the seed, the split and i alone: a source with a larger count begins with the same scenes, and
a larger size shows the same ones in more detail.
"""

from functools import partial
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from harmony.data.scenes.captions import captions
from harmony.data.scenes.layout import SplitName, scene
from harmony.data.scenes.paint import Picture, paint
from harmony.data.scenes.words import CLASSES, COLOURS, SHAPES
from harmony.data.sources.base import Example, Objects, Source
from harmony.errors import UserError
from harmony.validation import validated

VERSION = 2
"""Raised whenever a scene changes, so that a run does not go on with other pictures than it began with."""

_COUNTS = {"train": 8192, "val": 1024, "held_out": 1024}


class SceneSettings(BaseModel):
    """What a URI may say of the scenes: the split behind the colon, or any of these behind a question mark."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: Annotated[SplitName, Field(description="train, val or held_out")] = "train"
    count: Annotated[int | None, Field(ge=1, le=2**31, description="number of scenes; 8192 to train on, else 1024")] = (
        None
    )
    size: Annotated[int, Field(ge=16, le=2048, description="pixels a side")] = 64
    seed: Annotated[int, Field(ge=0, le=2**31, description="other seeds give other scenes")] = 0
    things: Annotated[
        Literal["class", "shape", "colour"], Field(description="what tells pixels and things apart; never the label")
    ] = "class"


class ScenesSource(Source):
    """Scenes painted when they are read.

    `Example.label` is the class of the main thing, which comes first in `Example.objects`. `Example.mask` is
    (size, size) uint8, 0 for the ground and 1 + the thing's class elsewhere (never 255).

    Args:
        place: the split, `train`, `val` or `held_out`; `train` when empty.
        query: settings as text.
        uri: what it was opened from.

    Raises:
        UserError: a setting that does not exist, or a value out of range.
    """

    def __init__(self, place: str, query: dict[str, str], uri: str) -> None:
        self.uri = uri
        self.class_names = list(CLASSES)
        if place and "split" in query:
            raise UserError(f"{uri} names the split twice; leave out one of {place!r} and split={query['split']}")
        self.settings = validated(SceneSettings, ({"split": place} if place else {}) | query, "scenes")
        names = {"class": CLASSES, "shape": SHAPES, "colour": tuple(COLOURS)}[self.settings.things]
        self.object_names = list(names)
        self.mask_names = ["ground", *names]
        self.has_object_masks = True

    def __len__(self) -> int:
        return self.settings.count or _COUNTS[self.settings.split]

    def __getitem__(self, i: int) -> Example:
        if not 0 <= i < len(self):
            raise IndexError(f"{i} is not in 0 .. {len(self) - 1}")
        drawn = scene(self.settings.seed, self.settings.split, i)
        picture = paint(drawn, self.settings.size)
        return Example(
            key=self.key(i),
            image=Image.fromarray(picture.pixels),
            captions=captions(drawn),
            label=drawn.things[0].label,
            mask=self._classed(picture.mask.astype(np.int64) - 1),
            objects=self._objects(picture, i),
        )

    def _objects(self, picture: Picture, i: int) -> Objects:
        masks = _masks(picture)
        left, top, width, height = picture.boxes.T
        return Objects(
            boxes=np.stack([left, top, left + width, top + height], axis=1),
            labels=self._classed(picture.labels).astype(np.int64) - 1,
            crowd=np.zeros(len(picture.labels), dtype=bool),
            areas=masks.sum((1, 2)).astype(np.float32),
            masks=partial(_masks, picture),
            image_id=i,
        )

    def _classed(self, classes: NDArray[np.int64]) -> NDArray[np.uint8]:
        """1 + what the setting `things` makes of class indices; 0 for -1, the ground."""
        colours = len(COLOURS)
        made = {"class": classes, "shape": classes // colours, "colour": classes % colours}[self.settings.things]
        return np.where(classes < 0, 0, made + 1).astype(np.uint8)

    def key(self, i: int) -> str:
        return f"{self.settings.split}-{i:08d}"

    def fingerprint(self) -> str:
        settings = self.settings
        return f"scenes-{VERSION}-{settings.split}-{len(self)}-{settings.size}-{settings.seed}"

    def shares_examples(self, other: Source) -> bool:
        """As it is where the split and the seed are the same, whatever the number and the size of the scenes."""
        if not isinstance(other, ScenesSource):
            return False
        return (self.settings.split, self.settings.seed) == (other.settings.split, other.settings.seed)

    def has_captions(self) -> bool:
        return True

    def caption_fields(self) -> list[str]:
        return ["captions"]


def _masks(picture: Picture) -> NDArray[np.bool_]:
    """(K, size, size), the pixels of each thing: no thing hides another, so they are those within its box."""
    masks = np.zeros((len(picture.labels), *picture.mask.shape), dtype=bool)
    for mask, label, (left, top, width, height) in zip(masks, picture.labels, picture.boxes.astype(int), strict=True):
        window = (slice(top, top + height), slice(left, left + width))
        mask[window] = picture.mask[window] == label + 1
    return masks
