"""Images with their masks: reading, checking, resizing.

Shapes: H x W pixels of an image, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as v2f

from harmony import ranks
from harmony.data.decode import decode
from harmony.data.sources import BadExample, Example, Source
from harmony.data.workers import count_workers, start_worker
from harmony.errors import UserError
from harmony.evaluation.crops import tell_bad
from harmony.evaluation.progress import track
from harmony.evaluation.segmentation.scores import IGNORE
from harmony.training.distributed import everyones


def read(source: Source, position: int, max_pixels: int) -> tuple[str, Tensor, Tensor]:
    """An example's key, image (3, H, W) uint8 and mask (H, W) int32, whose values are 0 .. C - 1 or `IGNORE`.

    Raises:
        BadExample: one of them is missing or damaged, they differ in size, or the mask has other values.
    """
    example = source[position]
    image = decode(example.image, max_pixels, example.key)
    values = _mask_of(example)
    if values.shape != tuple(image.shape[1:]):
        (height, width), (high, wide) = values.shape, image.shape[1:]
        raise BadExample(example.key, f"is {wide} x {high} px and its mask {width} x {height}")
    return example.key, image, _checked(values, source, example.key)


def _mask_of(example: Example) -> NDArray[np.integer[Any]]:
    """(H, W) integers as they are stored."""
    if example.mask is None:
        raise BadExample(example.key, "has no mask")
    values = np.asarray(example.mask)
    if values.ndim != 2 or values.dtype.kind not in "biu":
        raise BadExample(example.key, "has a mask in colour or fractions; it must hold one class index a pixel")
    return values


def _checked(values: NDArray[np.integer[Any]], source: Source, key: str) -> Tensor:
    classes = len(source.mask_names or [])
    mask = torch.from_numpy(values.astype(np.int32))
    wrong = mask[((mask < 0) | (mask >= classes)) & (mask != source.mask_ignore)]
    if len(wrong):
        raise BadExample(
            key,
            f"has a mask with the value {int(wrong[0])}, which is neither one of the classes 0 .. {classes - 1} "
            f"nor {source.mask_ignore} for no class",
        )
    return mask.masked_fill(mask == source.mask_ignore, IGNORE)


def size_at(height: int, width: int, short: int | None, scale: float = 1.0) -> tuple[int, int]:
    """Height and width once the shorter side has `short` px (its own if None), times `scale`."""
    factor = scale * (1.0 if short is None else short / min(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(3, H, W) uint8 -> (3, *size) uint8; bicubic with antialiasing, as images are resized for training."""
    if tuple(image.shape[1:]) == size:
        return image
    return v2f.resize_image(image, list(size), InterpolationMode.BICUBIC, antialias=True)


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """(H, W) -> size; each pixel takes the value at its own centre, so that mask and image do not shift."""
    if tuple(mask.shape) == size:
        return mask
    return v2f.resize_image(mask[None], list(size), InterpolationMode.NEAREST_EXACT)[0]


@dataclass(frozen=True)
class Picture:
    """An image to be measured, or why it cannot be.

    Attributes:
        position: in its source.
        pixels: (3, h, w) uint8, one for each scale that it is predicted at.
        mask: (H, W) int32 at the image's own size.
        bad: (key, reason), None for a good one.
    """

    position: int
    pixels: list[Tensor] = field(default_factory=list)
    mask: Tensor | None = None
    bad: tuple[str, str] | None = None


class Pictures(Dataset[Picture]):
    """Whole images with their masks.

    Args:
        source: where examples are.
        positions: which of them, in this order.
        short: the shorter side before scaling, None for their own.
        scales: factors of that size.
        max_pixels: images with more pixels count as bad.
    """

    def __init__(
        self, source: Source, positions: Sequence[int], short: int | None, scales: Sequence[float], max_pixels: int
    ) -> None:
        self.source, self.positions = source, positions
        self.short, self.scales = short, scales
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, place: int) -> Picture:
        position = self.positions[place]
        try:
            _, image, mask = read(self.source, position, self.max_pixels)
        except BadExample as bad:
            return Picture(position, bad=(bad.key, bad.reason))
        sizes = [size_at(mask.shape[0], mask.shape[1], self.short, scale) for scale in self.scales]
        return Picture(position, [resize_image(image, size) for size in sizes], mask)

    def loaded(self, workers: Any, doing: str) -> "Any":
        """The pictures in order, read ahead by workers, with a progress line."""
        count = count_workers(workers, 2**24)
        loader = DataLoader(
            self, batch_size=None, num_workers=min(count, max(0, len(self) - 1)), worker_init_fn=start_worker
        )
        return track(loader, len(self), doing)


@dataclass(frozen=True)
class Counted:
    """The masks of a training set.

    Attributes:
        usable: positions of examples that can be used.
        pixels: (C,) int64, pixels of each class.
        bad: (key, reason) of the others.
    """

    usable: list[int]
    pixels: Tensor
    bad: list[tuple[str, str]]


def count_classes(source: Source, workers: Any, max_pixels: int) -> Counted:
    """Read every image and mask once: which can be used, and which classes they show.

    Raises:
        UserError: none can be used, none has a pixel that belongs to a class, or all such pixels are of one.
    """
    mine = range(ranks.rank(), len(source), ranks.count())
    pictures = Pictures(source, mine, None, (), max_pixels)
    pixels = torch.zeros(len(source.mask_names or []), dtype=torch.int64)
    usable: list[int] = []
    bad: list[tuple[str, str]] = []
    for picture in pictures.loaded(workers, f"counting the classes of {len(source):,} masks"):
        if picture.bad is not None:
            bad.append(picture.bad)
        else:
            usable.append(picture.position)
            pixels += torch.bincount(picture.mask[picture.mask != IGNORE], minlength=len(pixels))
    found = everyones((usable, pixels, bad))
    counted = Counted(
        sorted(position for part in found for position in part[0]),
        sum((part[1] for part in found), torch.zeros_like(pixels)),
        [one for part in found for one in part[2]],
    )
    tell_bad(source.uri, counted.bad, len(source), "used")
    there = counted.pixels.nonzero().flatten().tolist()
    if not there:
        raise UserError(f"no pixel of {source.uri} belongs to a class; correct its masks")
    if len(there) == 1:
        only = (source.mask_names or [])[there[0]]
        raise UserError(f"all labelled pixels of {source.uri} are {only!r}; learning needs two classes or more")
    return counted


def require_usable(source: Source, positions: Sequence[int], max_pixels: int) -> None:
    """UserError when no example can be used, or none has a pixel that belongs to a class.

    Reads up to the first good one, so that it is said before the training and not after.
    """
    bad: list[tuple[str, str]] = []
    for position in positions:
        try:
            mask = read(source, position, max_pixels)[2]
        except BadExample as reason:
            bad.append((reason.key, reason.reason))
            continue
        if (mask != IGNORE).any():
            return
    tell_bad(source.uri, bad, len(positions), "used")
    raise UserError(f"no pixel of {source.uri} belongs to a class; correct its masks")
