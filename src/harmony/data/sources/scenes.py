"""Generated scenes: coloured, textured shapes on varied grounds, with captions, class, mask and boxes; no files.

    scenes:                                  the training split, 64 pixels a side
    scenes:held_out?count=512&size=96        things whose shape, colour and texture never come together in training
    scenes:val?seed=3                        new scenes of combinations that training does show

Scene i is a function of the seed, the split and i alone: a source with a larger count begins with the same scenes, and
a larger size shows the same ones in more detail.
"""

from typing import Annotated

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from harmony.data.scenes.captions import captions
from harmony.data.scenes.layout import SplitName, scene
from harmony.data.scenes.paint import paint
from harmony.data.scenes.words import CLASSES
from harmony.data.sources.base import Example, Source
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


class ScenesSource(Source):
    """Scenes painted when they are read.

    `Example.label` is the class of the main thing. `Example.extra` holds "mask", (size, size) uint8, 0 for the ground
    and 1 + class index elsewhere (never 255); "boxes", (K, 4) float32, left, top, width, height in pixels, the main
    thing's first; and "box_labels", (K,) int64.

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
            extra={"mask": picture.mask, "boxes": picture.boxes, "box_labels": picture.labels},
        )

    def key(self, i: int) -> str:
        return f"{self.settings.split}-{i:08d}"

    def fingerprint(self) -> str:
        settings = self.settings
        return f"scenes-{VERSION}-{settings.split}-{len(self)}-{settings.size}-{settings.seed}"

    def has_captions(self) -> bool:
        return True

    def caption_fields(self) -> list[str]:
        return ["captions"]
