"""Changes of colour and sharpness, one parameter a crop, for a whole batch at once.

The parameters are drawn from each example's chance where the batch is made, and travel in `Batch.photometric`; the
pixels are then changed there or on the device, by the same code. The lists of crops that a change applies to are drawn
with the parameters, so that a device need not be asked how many there are.

Shapes: B examples, V crops of a view, C = V * B crops laid end to end (all first crops, then all second ones), S pixels
a side of a crop.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag
from torch import Tensor

from harmony.chance import Chance
from harmony.data import pixels
from harmony.data.batch import Batch
from harmony.data.one_by_one import OneByOne
from harmony.data.ranges import Ascending
from harmony.errors import UserError, unknown

if TYPE_CHECKING:
    from harmony.data.views import ViewConfig

_Strength = Annotated[float, Field(ge=0, le=1)]
_Probability = Annotated[float, Field(ge=0, le=1)]
_Sigma = Annotated[float, Field(gt=0, le=64)]


class PhotometricConfig(BaseModel):
    """The changes of one crop: jitter (its four parts in a random order), then greyscale, then blur, then solarize."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    jitter: Annotated[_Probability, Field(description="probability of the four changes of colour below")] = 0.0
    brightness: Annotated[_Strength, Field(description="factor uniform in 1 +- this")] = 0.0
    contrast: Annotated[_Strength, Field(description="factor uniform in 1 +- this")] = 0.0
    saturation: Annotated[_Strength, Field(description="factor uniform in 1 +- this")] = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5, description="turn uniform in +- this, in rounds of the colour wheel")] = (
        0.0
    )
    grayscale: Annotated[_Probability, Field(description="probability of losing all colour")] = 0.0
    blur: Annotated[_Probability, Field(description="probability of Gaussian blur")] = 0.0
    sigma: Annotated[
        tuple[_Sigma, _Sigma], Ascending, Field(description="range of the blur's sigma in pixels of the crop")
    ] = (0.1, 2.0)
    solarize: Annotated[_Probability, Field(description="probability of inverting the bright pixels")] = 0.0
    threshold: Annotated[int, Field(ge=0, le=256, description="value (of 0 to 255) from which solarize inverts")] = 128


_DINO: dict[str, Any] = {
    "jitter": 0.8,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
    "grayscale": 0.2,
}

PRESETS: dict[str, PhotometricConfig] = {
    "none": PhotometricConfig(),
    # DINO (arXiv 2104.14294), after BYOL (arXiv 2006.07733, appendix B): the two global crops, and the local ones.
    "dino_first": PhotometricConfig(**_DINO, blur=1.0),
    "dino_second": PhotometricConfig(**_DINO, blur=0.1, solarize=0.2),
    "dino_local": PhotometricConfig(**_DINO, blur=0.5),
    # SimCLR (arXiv 2002.05709, appendix A) at strength 1.
    "simclr": PhotometricConfig(
        jitter=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, grayscale=0.2, blur=0.5
    ),
    # MoCo v2 (arXiv 2003.04297); SLIP (arXiv 2112.12750) uses it too.
    "moco_v2": PhotometricConfig(
        jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grayscale=0.2, blur=0.5
    ),
}


def preset(name: str) -> PhotometricConfig:
    """The settings of that name; UserError when there are none."""
    if name not in PRESETS:
        raise unknown("photometric preset", name, PRESETS)
    return PRESETS[name]


def _known(name: str) -> str:
    try:
        preset(name)
    except UserError as error:
        raise ValueError(str(error)) from None
    return name


def _kind(value: Any) -> str:
    return "preset" if isinstance(value, str) else "settings"


Look = Annotated[
    Annotated[str, AfterValidator(_known), Tag("preset")] | Annotated[PhotometricConfig, Tag("settings")],
    Discriminator(_kind),
]
"""How a crop's colours and sharpness change: a preset's name, or settings of one's own."""


def draw_photometric(chance: Chance, view_name: str, looks: Sequence[PhotometricConfig]) -> dict[str, Tensor]:
    """Draw the parameters of one view's crops.

    Args:
        chance: streams of the B examples; on the CPU, or the lists cost a wait for the device.
        view_name: name of the view; views of different names are independent.
        looks: the settings of each of its V crops.

    Returns:
        Named tensors. `factor`, `to_grey`, `to_mean`: (C, 3), the three blends of the jitter in each crop's own order
        (see `pixels.blend`); `turn`, `sigma`, `threshold`: (C); `hue_0` to `hue_3`: (n) int64, the crops whose hue
        turns after that many blends; `grey`, `blur`, `solarize`: (n) int64, the crops that these apply to. Empty when
        no crop is ever changed.
    """
    if all(look == PRESETS["none"] for look in looks):
        return {}
    draw = _Draw(chance, f"{view_name}/photometric", looks)
    jittered = draw.happens("jitter")
    strengths = torch.stack([draw.strength(name) for name in ("brightness", "contrast", "saturation")], -1)
    factors = 1 + strengths * jittered[:, None]
    turn = draw.strength("hue") * jittered
    # Position of brightness, contrast, saturation and hue in a random order of the four.
    position = draw.uniform("order", 4).argsort(dim=-1, stable=True).argsort(dim=-1)
    hue_position = position[:, 3:]
    slot = position[:, :3] - (position[:, :3] > hue_position).long()
    kind = torch.empty_like(slot).scatter_(1, slot, torch.arange(3, device=slot.device).expand_as(slot))
    low, high = draw.settings("sigma").unbind(-1)
    drawn = {
        "factor": torch.empty_like(factors).scatter_(1, slot, factors),
        "to_mean": (kind == 1).float(),
        "to_grey": (kind == 2).float(),
        "turn": turn,
        "sigma": low + (high - low) * draw.uniform("sigma"),
        "threshold": draw.settings("threshold") / 255,
        "grey": _list(draw.happens("grayscale")),
        "blur": _list(draw.happens("blur")),
        "solarize": _list(draw.happens("solarize")),
    }
    return drawn | {f"hue_{k}": _list((turn != 0) & (hue_position[:, 0] == k)) for k in range(4)}


class _Draw:
    """Draws for the C crops of one view, whose settings differ from crop to crop."""

    def __init__(self, chance: Chance, name: str, looks: Sequence[PhotometricConfig]) -> None:
        self.chance, self.name, self.looks = chance, name, looks

    def uniform(self, name: str, *shape: int) -> Tensor:
        """(C, *shape) in [0, 1)."""
        return self.chance.uniform(f"{self.name}/{name}", len(self.looks), *shape).transpose(0, 1).flatten(0, 1)

    def settings(self, name: str) -> Tensor:
        """(C, ...), the setting of that name of each crop."""
        values = torch.tensor([getattr(look, name) for look in self.looks], dtype=torch.float32)
        return values.repeat_interleave(len(self.chance), 0).to(self.chance.keys.device)

    def happens(self, name: str) -> Tensor:
        """(C) bool, true with the probability that is the setting of that name."""
        return self.uniform(name) < self.settings(name)

    def strength(self, name: str) -> Tensor:
        """(C), uniform in plus or minus the setting of that name."""
        return (2 * self.uniform(f"{name}_strength") - 1) * self.settings(name)


def _list(chosen: Tensor) -> Tensor:
    return chosen.nonzero()[:, 0]


def augment(batch: Batch, views: Mapping[str, "ViewConfig"], mean: Sequence[float], std: Sequence[float]) -> Batch:
    """The batch with its crops changed as their views say, and normalised.

    Args:
        batch: its `images` are uint8, on any device. Views whose parameters are not in `batch.photometric` draw them
            here, which makes a GPU wait.
        views: the settings of the views in `batch.images`.
        mean: what is taken from red, green and blue, in units of the full range.
        std: what they are then divided by.

    Returns:
        The batch with `images` (V, B, 3, S, S) float32.
    """
    images = {}
    for name, crops in batch.images.items():
        looks = views[name].looks
        drawn = batch.photometric.get(name)
        if drawn is None:
            drawn = draw_photometric(batch.chance, name, looks)
        radius = blur_radius(looks, crops.shape[-1])
        images[name] = _augmented(crops.flatten(0, 1), drawn, radius, mean, std).view(crops.shape)
    return replace(batch, images=images)


def blur_radius(looks: Sequence[PhotometricConfig], size: int) -> int:
    """Pixels at which the blur's kernel ends: three times the largest sigma, and less than a crop's side."""
    return min(math.ceil(3 * max(look.sigma[1] for look in looks)), size - 1)


_ONE_BY_ONE = 2**16
"""Values from which on a crop is changed by itself on a CPU; smaller ones cost more in calls than in arithmetic."""

_CHUNK = 2**20
"""Values of smaller crops that a CPU changes at a time, so that they stay in its cache."""


def _augmented(
    crops: Tensor, drawn: Mapping[str, Tensor], radius: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """(C, 3, S, S) float32 from uint8, laid out by channel whatever the crops' order in memory."""
    result = torch.empty(crops.shape, dtype=torch.float32, device=crops.device)
    if crops.device.type != "cpu":
        return normalised(apply(result.copy_(crops).div_(255), drawn, radius), mean, std)
    if drawn and crops[0].numel() >= _ONE_BY_ONE:
        one_by_one = OneByOne(drawn, radius, crops.shape[-1])
        for number, (image, crop) in enumerate(zip(result, crops, strict=True)):
            one_by_one.change(image.copy_(crop).div_(255), number)
            normalised(image, mean, std)
        return result
    length = max(1, _CHUNK // crops[0].numel())
    for start in range(0, len(crops), length):
        chunk = result[start : start + length]
        apply(chunk.copy_(crops[start : start + length]).div_(255), _part(drawn, start, start + length), radius)
        normalised(chunk, mean, std)
    return result


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The images (..., 3, S, S), changed in place."""
    for channel in range(3):  # with plain numbers, because a tensor would have to be sent to the device
        images[..., channel, :, :].sub_(mean[channel]).div_(std[channel])
    return images


_PER_CROP = ("factor", "to_grey", "to_mean", "turn", "sigma", "threshold")


def _part(drawn: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """The parameters of the crops from `start` to `stop`; only for the CPU, since it makes lists."""
    part = {}
    for name, values in drawn.items():
        if name in _PER_CROP:
            part[name] = values[start:stop]
        else:
            part[name] = values[(values >= start) & (values < stop)] - start
    return part


def apply(images: Tensor, drawn: Mapping[str, Tensor], radius: int) -> Tensor:
    """Change images (C, 3, S, S), float in [0, 1], by the parameters of `draw_photometric`, in place."""
    if not drawn:
        return images
    for k in range(4):
        _change(images, drawn[f"hue_{k}"], pixels.turn_hue, drawn["turn"])
        if k < 3:
            pixels.blend(images, drawn["to_grey"][:, k], drawn["to_mean"][:, k], drawn["factor"][:, k])
    _change(images, drawn["grey"], lambda some: pixels.grey(some).expand_as(some))
    _change(images, drawn["blur"], lambda some, sigma: pixels.gaussian_blur(some, sigma, radius), drawn["sigma"])
    _change(images, drawn["solarize"], pixels.solarize, drawn["threshold"])
    return images


def _change(images: Tensor, which: Tensor, change: Callable[..., Tensor], *parameters: Tensor) -> None:
    """Change only the listed images, each with its own parameters."""
    if len(which) == len(images):  # all of them, since the list is in order
        images.copy_(change(images, *parameters))
    elif len(which):
        some = images.index_select(0, which)
        images.index_copy_(0, which, change(some, *(values.index_select(0, which) for values in parameters)))
