"""The random crops that a head learns from.

Shapes: B crops of a batch, S pixels a side of a crop, H x W pixels of an image.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms import v2

from harmony.data.sources import BadExample, Source
from harmony.errors import UserError
from harmony.evaluation.fitting import Batches
from harmony.evaluation.segmentation.data import read, resize_image, resize_mask, size_at
from harmony.evaluation.segmentation.scores import IGNORE
from harmony.evaluation.settings import SegmentationConfig
from harmony.models.settings import Colour

TRIES = 10
"""Crops drawn before one that shows too much of a single class is taken all the same (MMSegmentation's number)."""


class TrainingCrops(Batches[tuple[Tensor, Tensor]]):
    """Random scale, crop, flip and change of colour, the same for an image and its mask.

    A batch is crops (B, 3, S, S) uint8 and masks (B, S, S) int32. What lies outside an image that is smaller than the
    crop has the mean colour, and belongs to no class.

    Args:
        source: where examples are.
        positions: those that can be used.
        config: the augmentation and the length of the training.
        size: S.
        short: the images' shorter side before the random scale, None for their own.
        mean: RGB mean that inputs are normalised with.
        max_pixels: images with more pixels count as bad.
    """

    def __init__(
        self,
        source: Source,
        positions: Sequence[int],
        config: SegmentationConfig,
        size: int,
        short: int | None,
        mean: Colour,
        max_pixels: int,
    ) -> None:
        super().__init__(len(positions), config)
        self.source = source
        self.positions = positions
        self.augmentation = config
        self.size = size
        self.short = short
        self.fill = torch.tensor(mean).mul(255).round().to(torch.uint8)
        self.max_pixels = max_pixels
        self.photometric = photometric() if config.photometric else None

    def make(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        crops = [self.crop(*self._read(self.positions[position])) for position in positions]
        images, masks = zip(*crops, strict=True)
        return torch.stack(images), torch.stack(masks)

    def crop(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """One crop (3, S, S) and its mask (S, S); draws from torch's generator."""
        low, high = self.augmentation.scale
        size = size_at(mask.shape[0], mask.shape[1], self.short, low + (high - low) * float(torch.rand(())))
        image, mask = resize_image(image, size), resize_mask(mask, size)
        window = self._window(mask)
        image, mask = image[:, *window], mask[window]
        if float(torch.rand(())) < self.augmentation.flip:
            image, mask = image.flip(-1), mask.flip(-1)
        if self.photometric is not None:
            image = self.photometric(image)
        whole = self.fill[:, None, None].repeat(1, self.size, self.size)
        target = torch.full((self.size, self.size), IGNORE, dtype=mask.dtype)
        whole[:, : image.shape[1], : image.shape[2]] = image
        target[: mask.shape[0], : mask.shape[1]] = mask
        return whole, target

    def _window(self, mask: Tensor) -> tuple[slice, slice]:
        """Where to cut: at random, and not where one class takes nearly all of it."""
        window = (slice(None), slice(None))
        for _ in range(TRIES):
            top, left = (int(torch.randint(max(1, side - self.size + 1), ())) for side in mask.shape)
            window = (slice(top, top + self.size), slice(left, left + self.size))
            inside = mask[window]
            counts = torch.bincount(inside[inside != IGNORE])
            if len(counts) and float(counts.max()) <= self.augmentation.most_of_one_class * float(counts.sum()):
                break
        return window

    def _read(self, position: int) -> tuple[Tensor, Tensor]:
        try:
            return read(self.source, position, self.max_pixels)[1:]
        except BadExample as bad:  # it could be read when the masks were counted
            raise UserError(f"{self.source.uri} has changed during the training: {bad}; start again") from None


def photometric() -> v2.Transform:
    """Brightness, contrast, saturation and hue, each changed for half of the images, as far as MMSegmentation does."""
    changes: list[dict[str, float]] = [
        {"brightness": 32 / 255},
        {"contrast": 0.5},
        {"saturation": 0.5},
        {"hue": 18 / 360},
    ]
    return v2.Compose([v2.RandomApply([v2.ColorJitter(**change)], p=0.5) for change in changes])
