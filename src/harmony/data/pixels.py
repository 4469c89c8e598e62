"""Changes of colour and sharpness with one parameter an image, equal to torchvision's of the same parameter.

Images are (C, 3, S, S) float with values in [0, 1]; a parameter is (C). Nothing here asks the device for a number.
"""

import torch
from torch import Tensor
from torch.nn import functional

RED, GREEN, BLUE = 0.2989, 0.587, 0.114
"""ITU-R 601-2, with torchvision's rounding."""


def grey(images: Tensor) -> Tensor:
    """(C, 1, S, S), the brightness of every pixel."""
    red, green, blue = images.unbind(1)
    return (red * RED).add_(green, alpha=GREEN).add_(blue, alpha=BLUE)[:, None]


def blend(images: Tensor, to_grey: Tensor, to_mean: Tensor, factor: Tensor) -> Tensor:
    """Move images, in place, away from black, their own grey or their mean grey: brightness, saturation, contrast.

    Args:
        images: (C, 3, S, S).
        to_grey: (C) in {0, 1}, images whose saturation is changed.
        to_mean: (C) in {0, 1}, images whose contrast is changed; the rest change in brightness.
        factor: (C), 0 gives the black, grey or flat image, 1 leaves the image as it is.
    """
    rest = 1 - factor
    mean = grey(images.mean((2, 3))[..., None, None]) * (rest * to_mean).view(-1, 1, 1, 1)
    weight = (rest * to_grey).view(-1, 1, 1)
    red, green, blue = images.unbind(1)
    other = (red * (weight * RED)).addcmul_(green, weight * GREEN).addcmul_(blue, weight * BLUE)[:, None].add_(mean)
    return images.mul_(factor.view(-1, 1, 1, 1)).add_(other).clamp_(0, 1)


def turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the colour wheel by `turn` rounds, through hue, saturation and value (HSV).

    The largest, the middle and the smallest of a pixel's values come from minima and maxima, and from which of them
    were exchanged follows the sixth of the wheel. Results are written over numbers that are no longer needed, because
    fetching fresh memory would take a CPU longer than the arithmetic.
    """
    red, green, blue = images.unbind(1)
    larger, smaller = torch.maximum(green, blue), torch.minimum(green, blue)
    value, middle = torch.maximum(red, larger), torch.minimum(red, larger)
    start = torch.lt(green, blue, out=torch.empty_like(value))  # as numbers, 0 or 1
    exchanged = torch.lt(red, larger, out=larger)
    chroma = torch.sub(value, torch.minimum(middle, smaller))
    # Hue in sixths of the wheel, counted from red as |start +- ...|. A grey pixel has chroma 0, and any hue will do.
    share = middle.sub_(smaller).div_(torch.clamp(chroma, min=1e-12, out=smaller))
    hue = share.addcmul_(torch.mul(start, 12, out=smaller).sub_(2), exchanged).sub_(start, alpha=6).abs_()
    hue.div_(6).add_(turn.view(-1, 1, 1) + 1).frac_().mul_(6)  # back to [0, 6): red at 0 and 6, green at 2, blue at 4
    turned = torch.empty_like(images)
    high, low = value + chroma, value.sub_(chroma, alpha=2)
    for channel, (base, place, sign) in enumerate(((low, 3, 1), (high, 2, -1), (high, 4, -1))):
        away = torch.sub(hue, place, out=start).abs_().clamp_(1, 2)
        torch.addcmul(base, away, chroma, value=sign, out=turned[:, channel])
    return turned


def gaussian_blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur with a Gaussian of `sigma` pixels, cut off at `radius` pixels and reflected at the edges."""
    offsets = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    kernel = (-0.5 * (offsets / sigma[:, None]).square()).softmax(1)  # (C, 2 * radius + 1)
    taps = kernel.view(-1, 2 * radius + 1, 1, 1).unbind(1)
    count, channels, size, _ = images.shape
    wide = size + 2 * radius
    # Rows lie end to end, so that a shift to the side is one of the whole image, as a shift down is of whole rows.
    flat = functional.pad(images, (radius,) * 4, mode="reflect").view(count, channels, wide * wide)
    down = _weighted([flat[..., k * wide : (k + size) * wide] for k in range(2 * radius + 1)], taps)
    length = size * wide - 2 * radius
    across = torch.empty_like(down)
    _weighted([down[..., k : k + length] for k in range(2 * radius + 1)], taps, across[..., :length])
    return across.view(count, channels, size, wide)[..., :size]


def _weighted(shifted: list[Tensor], weights: tuple[Tensor, ...], out: Tensor | None = None) -> Tensor:
    """The sum of the shifted images times their weights; a convolution would do, but may round to TF32 on a GPU."""
    total = torch.mul(shifted[0], weights[0], out=out)
    for image, weight in zip(shifted[1:], weights[1:], strict=True):
        total.addcmul_(image, weight)
    return total


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert the values of at least `threshold`."""
    bright = images.clone().ge_(threshold.view(-1, 1, 1, 1))
    return torch.addcmul(images, bright, 1 - 2 * images)
