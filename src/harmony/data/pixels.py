"""Changes of colour and sharpness with one parameter an image, equal to torchvision's of the same parameter.

Images are (C, 3, S, S) float with values in [0, 1]; a parameter is (C). Nothing here asks the device for a number.
"""

import torch
from torch import Tensor
from torch.nn import functional


def grey(images: Tensor) -> Tensor:
    """(C, 1, S, S), the brightness of every pixel (ITU-R 601-2, with torchvision's rounding of the weights)."""
    red, green, blue = images.unbind(1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)[:, None]


def blend(images: Tensor, to_grey: Tensor, to_mean: Tensor, factor: Tensor) -> Tensor:
    """Move images away from black, from their own grey or from their mean grey: brightness, saturation, contrast.

    Args:
        images: (C, 3, S, S).
        to_grey: (C) in {0, 1}, images whose saturation is changed.
        to_mean: (C) in {0, 1}, images whose contrast is changed; the rest change in brightness.
        factor: (C), 0 gives the black, grey or flat image, 1 leaves the image as it is.
    """
    keep, rest = factor.view(-1, 1, 1, 1), (1 - factor).view(-1, 1, 1, 1)
    brightness = grey(images)
    mean = brightness.mean((1, 2, 3), keepdim=True) * (rest * to_mean.view(-1, 1, 1, 1))
    other = brightness.mul_(rest * to_grey.view(-1, 1, 1, 1)).add_(mean)
    return images.mul(keep).add_(other).clamp_(0, 1)


def turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the colour wheel by `turn` rounds, through hue, saturation and value (HSV)."""
    red, green, blue = images.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    # Comparisons in place give numbers, 0 or 1: several times as fast on a CPU as torch.where.
    is_red = value.clone().eq_(red)
    is_green = value.clone().eq_(green).mul_(1 - is_red)
    is_blue = 1 - is_red - is_green
    # Hue in sixths of the wheel. A grey pixel has chroma 0, and any hue will do.
    hue = is_red * (green - blue) + is_green * (blue - red) + is_blue * (red - green)
    hue = hue.div_(chroma.clamp(min=1e-12)).add_(is_green, alpha=2).add_(is_blue, alpha=4)
    hue.add_(6 * turn.view(-1, 1, 1))
    hue.sub_((hue / 6).floor_(), alpha=6)  # back to [0, 6): red at 0 and 6, green at 2, blue at 4
    turned = torch.empty_like(images)
    for channel, share in enumerate(((hue - 3).abs_().sub_(1), 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_())):
        turned[:, channel] = share.clamp_(0, 1).sub_(1).mul_(chroma).add_(value)
    return turned


def gaussian_blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur with a Gaussian of `sigma` pixels, cut off at `radius` pixels and reflected at the edges."""
    offsets = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    kernel = (-0.5 * (offsets / sigma[:, None]).square()).softmax(1)  # (C, 2 * radius + 1)
    taps = kernel.view(-1, 2 * radius + 1, 1, 1, 1).unbind(1)
    size = images.shape[-1]
    padded = functional.pad(images, (0, 0, radius, radius), mode="reflect")
    rows = _weighted([padded[..., k : k + size, :] for k in range(2 * radius + 1)], taps)
    padded = functional.pad(rows, (radius, radius, 0, 0), mode="reflect")
    return _weighted([padded[..., k : k + size] for k in range(2 * radius + 1)], taps)


def _weighted(shifted: list[Tensor], weights: tuple[Tensor, ...]) -> Tensor:
    """The sum of the shifted images times their weights; a convolution would do, but may round to TF32 on a GPU."""
    total = shifted[0] * weights[0]
    for image, weight in zip(shifted[1:], weights[1:], strict=True):
        total.addcmul_(image, weight)
    return total


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert the values of at least `threshold`."""
    bright = images.clone().ge_(threshold.view(-1, 1, 1, 1))
    return torch.addcmul(images, bright, 1 - 2 * images)
