"""The changes of `photometric`, crop after crop: what a CPU is fast at.

A CPU spends its time on memory more than on arithmetic. So each crop is changed in place, in memory that the next one
uses again; it gets only the changes that were drawn for it; and its parameters are plain numbers. `photometric.apply`
makes the same changes on a whole batch at once, which suits a GPU, and crops so small that calls cost more than what
they do. Both give the same to rounding.

Shapes: C crops of S pixels a side.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from harmony.data import pixels
from harmony.data.pixels import BLUE, GREEN, RED

_REACH = 5.6
"""Standard deviations at which a Gaussian has fallen to what rounding takes anyway, 1.5e-7 of its height."""


class OneByOne:
    """Changes crops of one view by the parameters of `photometric.draw_photometric`, on the CPU.

    Args:
        drawn: the parameters of the C crops.
        radius: pixels at which the blur's kernel ends.
        size: S.
    """

    def __init__(self, drawn: Mapping[str, Tensor], radius: int, size: int) -> None:
        self._radius, self._threshold = radius, drawn["threshold"]
        names = ("factor", "to_grey", "to_mean", "turn", "sigma")
        self._numbers: dict[str, list[Any]] = {name: drawn[name].tolist() for name in names}
        self._hue_after = {crop: k for k in range(4) for crop in drawn[f"hue_{k}"].tolist()}
        self._listed = {name: set(drawn[name].tolist()) for name in ("grey", "blur", "solarize")}
        self._planes = torch.empty(6, size, size).unbind(0)
        self._down, self._across = torch.empty(2, 3 * size * (size + 2 * radius)).unbind(0)

    def change(self, image: Tensor, crop: int) -> None:
        """Change `image` (3, S, S), float in [0, 1], in place, as was drawn for that crop of 0 .. C - 1."""
        numbers = {name: values[crop] for name, values in self._numbers.items()}
        for k in range(4):
            if self._hue_after.get(crop) == k:
                self._turn_hue(image, numbers["turn"])
            if k < 3 and numbers["factor"][k] != 1:
                self._blend(image, numbers["factor"][k], numbers["to_grey"][k], numbers["to_mean"][k])
        if crop in self._listed["grey"]:
            image.copy_(pixels.grey(image[None])[0])
        if crop in self._listed["blur"]:
            self._blur(image, numbers["sigma"])
        if crop in self._listed["solarize"]:
            image.copy_(pixels.solarize(image[None], self._threshold[crop : crop + 1])[0])

    def _blend(self, image: Tensor, factor: float, to_grey: float, to_mean: float) -> None:
        if to_mean:
            red, green, blue = image.mean((1, 2)).tolist()
            image.mul_(factor).add_((1 - factor) * (RED * red + GREEN * green + BLUE * blue))
        elif to_grey:
            red, green, blue = (weight * (1 - factor) for weight in (RED, GREEN, BLUE))
            grey = torch.mul(image[0], red, out=self._planes[0]).add_(image[1], alpha=green).add_(image[2], alpha=blue)
            image.mul_(factor).add_(grey)
        else:
            image.mul_(factor)
        image.clamp_(0, 1)

    def _turn_hue(self, image: Tensor, turn: float) -> None:
        """As `pixels.turn_hue`, which says how."""
        red, green, blue = image.unbind(0)
        larger, smaller, value, middle, start, chroma = self._planes
        torch.maximum(green, blue, out=larger)
        torch.minimum(green, blue, out=smaller)
        torch.maximum(red, larger, out=value)
        torch.minimum(red, larger, out=middle)
        torch.lt(green, blue, out=start)
        exchanged = torch.lt(red, larger, out=larger)
        torch.sub(value, torch.minimum(middle, smaller, out=chroma), out=chroma)
        share = middle.sub_(smaller).div_(torch.clamp(chroma, min=1e-12, out=smaller))
        hue = share.addcmul_(torch.mul(start, 12, out=smaller).sub_(2), exchanged).sub_(start, alpha=6).abs_()
        hue.mul_(1 / 6).add_(turn + 1).frac_().mul_(6)
        high, low = torch.add(value, chroma, out=larger), value.sub_(chroma, alpha=2)
        for channel, (base, place, sign) in enumerate(((low, 3, 1), (high, 2, -1), (high, 4, -1))):
            away = torch.sub(hue, place, out=start).abs_().clamp_(1, 2)
            torch.addcmul(base, away, chroma, value=sign, out=image[channel])

    def _blur(self, image: Tensor, sigma: float) -> None:
        """As `pixels.gaussian_blur`, without what is too far away to count."""
        taps = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(self._radius + 1)]
        total = taps[0] + 2 * sum(taps[1:])
        radius = min(self._radius, math.ceil(_REACH * sigma))
        weights = [tap / total for tap in taps[: radius + 1]]
        size = image.shape[-1]
        wide, length = size + 2 * radius, size * (size + 2 * radius)
        # Rows lie end to end, so that a shift to the side is one of the whole image, as a shift down is of whole rows.
        flat = functional.pad(image, (radius,) * 4, mode="reflect").view(3, wide * wide)
        down, across = (memory[: 3 * length].view(3, length) for memory in (self._down, self._across))
        _weighted(flat, weights, wide, down)
        _weighted(down, weights, 1, across[:, : length - 2 * radius])
        image.copy_(across.view(3, size, wide)[..., :size])


def _weighted(flat: Tensor, weights: list[float], stride: int, out: Tensor) -> None:
    """The sum of `flat` shifted by each whole number of strides, from the left end on, times the weights."""
    middle, length = (len(weights) - 1) * stride, out.shape[1]
    torch.mul(flat[:, middle : middle + length], weights[0], out=out)
    for k, weight in enumerate(weights[1:], start=1):
        for start in (middle - k * stride, middle + k * stride):
            out.add_(flat[:, start : start + length], alpha=weight)
