"""The views of an image: what they are, and where their crops lie, drawn from chance. `cutting` cuts them.

Shapes: B examples, V crops of a view, S pixels a side of a crop. An image is (3, H, W) uint8. A box is left, top,
width, height.
"""

import math
from typing import Annotated, Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from torch import Tensor
from torch.nn import functional

from harmony.chance import Chance
from harmony.data.photometric import Look, PhotometricConfig, preset
from harmony.data.ranges import Ascending, PositiveRange

ATTEMPTS = 10
"""Random rectangles tried an image before the central one is taken, as torchvision does."""


_AreaShare = Annotated[float, Field(gt=0, le=1)]


def _one_or_list(value: Any) -> str:
    return "list" if isinstance(value, list | tuple) else "one"


class ViewConfig(BaseModel):
    """How one view is made from an image: `count` random resized crops of `size` pixels a side."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: Annotated[int, Field(ge=1, description="crops an image")] = 1
    size: Annotated[int, Field(ge=2, description="pixels a side of a crop")]
    scale: Annotated[
        tuple[_AreaShare, _AreaShare],
        Ascending,
        Field(description="range of a crop's area as a share of the image"),
    ] = (1.0, 1.0)
    ratio: Annotated[
        PositiveRange,
        Field(description="range of a crop's width over its height before it is resized to a square"),
    ] = (3 / 4, 4 / 3)
    flip: Annotated[float, Field(ge=0, le=1, description="probability that a crop is mirrored left to right")] = 0.5
    photometric: Annotated[
        Annotated[Look, Tag("one")] | Annotated[list[Look], Tag("list")],
        Discriminator(_one_or_list),
        Field(
            description="changes of colour and sharpness: a preset's name or settings, or a list of them, one a crop"
        ),
    ] = "none"

    @model_validator(mode="after")
    def _one_photometric_a_crop(self) -> Self:
        if isinstance(self.photometric, list) and len(self.photometric) != self.count:
            raise ValueError(
                f"`photometric` lists {len(self.photometric)} entries for {self.count} crops; "
                "give one for each crop, or a single one for all"
            )
        return self

    @property
    def looks(self) -> list[PhotometricConfig]:
        """The photometric settings of each of the V crops."""
        listed = self.photometric if isinstance(self.photometric, list) else [self.photometric] * self.count
        return [preset(look) if isinstance(look, str) else look for look in listed]


def draw_boxes(chance: Chance, view_name: str, config: ViewConfig, sizes: Tensor) -> Tensor:
    """Crop boxes with the distribution of torchvision's RandomResizedCrop.

    Args:
        chance: streams of the B examples.
        view_name: name of the view; views of different names are independent.
        config: the view.
        sizes: (B, 2), height and width of the images in pixels, as in `image.shape[1:]`.

    Returns:
        (V, B, 4) int64 on the CPU: left, top, width, height in pixels.
    """
    numbers = chance.uniform(f"{view_name}/boxes", config.count, ATTEMPTS, 2).double()  # (B, V, attempts, 2)
    height, width = (side.view(-1, 1, 1).double() for side in sizes.unbind(1))
    area = height * width * _between(numbers[..., 0], *config.scale)
    aspect = _between(numbers[..., 1], math.log(config.ratio[0]), math.log(config.ratio[1])).exp()
    wide, high = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (wide >= 1) & (wide <= width) & (high >= 1) & (high <= height)
    first = fits.int().argmax(-1, keepdim=True)
    wide, high, found = (values.gather(-1, first)[..., 0] for values in (wide, high, fits))  # (B, V)
    place = chance.uniform(f"{view_name}/places", config.count, 2).double()
    height, width = height[..., 0], width[..., 0]
    left = (place[..., 0] * (width - wide + 1)).floor()
    top = (place[..., 1] * (height - high + 1)).floor()
    drawn = torch.stack([left, top, wide, high], -1)
    boxes = torch.where(found[..., None], drawn, _central_boxes(config.ratio, height, width))
    return boxes.long().transpose(0, 1).contiguous()


def _between(share: Tensor, low: float, high: float) -> Tensor:
    return low + share * (high - low)


def _central_boxes(ratio: tuple[float, float], height: Tensor, width: Tensor) -> Tensor:
    """The largest central box whose aspect is within `ratio`, a pixel at least: (B, 1, 4) from (B, 1) sides."""
    wide = torch.where(width / height > ratio[1], (height * ratio[1]).round().clamp(min=1), width)
    high = torch.where(width / height < ratio[0], (width / ratio[0]).round().clamp(min=1), height)
    return torch.stack([((width - wide) / 2).floor(), ((height - high) / 2).floor(), wide, high], -1)


def draw_flips(chance: Chance, view_name: str, config: ViewConfig) -> Tensor:
    """(V, B) bool, the crops that are mirrored left to right."""
    return (chance.uniform(f"{view_name}/flips", config.count) < config.flip).T.contiguous()


def relative_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Pixel boxes (V, B, 4) as shares of images of the given heights and widths (B, 2): (V, B, 4) float32."""
    height, width = sizes.double().unbind(1)
    return (boxes / torch.stack([width, height, width, height], -1)).float()


def evaluation_crop(image: Tensor, size: int) -> Tensor:
    """The central square of an image whose shorter side was resized to `size`: (3, size, size) uint8."""
    height, width = image.shape[1:]
    short = min(height, width)
    resized = (int(size * height / short), int(size * width / short))
    whole = functional.interpolate(image[None], resized, mode="bicubic", align_corners=False, antialias=True)[0]
    top, left = (round((side - size) / 2.0) for side in resized)
    return whole[:, top : top + size, left : left + size].contiguous()
