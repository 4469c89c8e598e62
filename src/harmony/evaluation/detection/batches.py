"""Batches to learn detection from."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from harmony.data.sources import BadExample, Source
from harmony.errors import UserError
from harmony.evaluation.detection.heads import Sizes
from harmony.evaluation.detection.proposals import Target
from harmony.evaluation.detection.things import Scene, colour_of, jittered, padded, read
from harmony.evaluation.fitting import Batches
from harmony.evaluation.settings import DetectionConfig
from harmony.models.settings import Colour

THINGS = 10
"""Things an image has, about; their masks take most of a batch's memory."""

TRIES = 100
"""Unreadable examples in a row after which the data count as unreadable."""


@dataclass
class Batch:
    """Images (B, 3, S, S) uint8, their sizes within the squares, their things, and who could not be read."""

    pixels: Tensor
    sizes: Sizes
    targets: list[Target]
    bad: list[str] = field(default_factory=list)


class DetectionBatches(Batches[Batch]):
    """Jittered images in squares of S px.

    Args:
        source: the training data.
        config: the task's settings.
        size: S.
        mean: the encoder's, for the colour around images.
        max_pixels: images with more pixels count as bad.
        with_masks: whether masks are learned.
    """

    def __init__(
        self, source: Source, config: DetectionConfig, size: int, mean: Colour, max_pixels: int, with_masks: bool
    ) -> None:
        super().__init__(len(source), config)
        self.source, self.size, self.fill = source, size, colour_of(mean)
        self.scale, self.flip = config.scale, config.flip
        self.max_pixels, self.with_masks = max_pixels, with_masks
        self.example_bytes = size**2 * (3 + (THINGS if with_masks else 0))

    def make(self, positions: Sequence[int]) -> Batch:
        batch = Batch(torch.empty(len(positions), 3, self.size, self.size, dtype=torch.uint8), [], [])
        for place, position in enumerate(positions):
            scene = jittered(self._readable(position, batch.bad), self.size, self.scale, self.flip)
            batch.pixels[place] = padded(scene.image, self.size, self.fill)
            batch.sizes.append(scene.sides)
            batch.targets.append(target(scene, self.size))
        return batch

    def _readable(self, position: int, bad: list[str]) -> Scene:
        """The example at a position, or the next one that can be read."""
        for step in range(TRIES):
            try:
                return read(self.source, (position + step) % self.examples, self.max_pixels, self.with_masks)
            except BadExample as error:
                bad.append(str(error))
        raise UserError(
            f"{TRIES} examples of {self.source.uri} in a row cannot be read: {bad[-1]}; correct the training data"
        )


def target(scene: Scene, size: int) -> Target:
    """A scene's things as the detector learns them; of crowds it learns where not to look."""
    things = scene.only(~scene.crowd)
    out = {"boxes": things.boxes, "labels": things.labels + 1, "crowd": scene.boxes[scene.crowd]}
    if things.masks is not None:
        high, wide = things.masks.shape[1:]
        masks = torch.zeros(len(things.masks), size, size, dtype=torch.uint8)
        masks[:, :high, :wide] = things.masks
        out["masks"] = masks
    return out


def moved(targets: list[Target], device: torch.device) -> list[Target]:
    """Targets on a device."""
    return [{name: value.to(device, non_blocking=True) for name, value in one.items()} for one in targets]
