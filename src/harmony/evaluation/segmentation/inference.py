"""The class of every pixel of a whole image: a window slid over it, several scales, enlarged to the image's own size.

Shapes: C classes, S pixels a side of a window, H x W pixels of an image.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ENLARGED_AT_ONCE = 2**26
"""Scores enlarged to an image's own size at a time, which bounds the memory that a large image with many classes takes
(a quarter of a GiB)."""


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin that cover 0 .. length - 1 in steps of `stride`; the last one is moved back to the edge."""
    if length <= window:
        return [0]
    steps = -(-(length - window) // stride)
    return [min(step * stride, length - window) for step in range(steps + 1)]


def stride_of(size: int, share: float, patch: int) -> int:
    """The window's step in px: a share of its side in whole patches, at least one."""
    return min(size, max(1, round(size * share / patch)) * patch)


def slide(predict: Callable[[Tensor], Tensor], pixels: Tensor, size: int, stride: int, batch_size: int) -> Tensor:
    """Scores of every pixel, averaged where windows overlap.

    Args:
        predict: (B, 3, S, S) -> (B, C, h, w), which are enlarged to S bilinearly.
        pixels: (3, H, W) normalised. A side below S is filled up with zeros, the mean colour, and what is predicted
            there is dropped.
        size: S.
        stride: px from one window to the next.
        batch_size: windows predicted at a time.

    Returns:
        (C, H, W) float32.
    """
    height, width = pixels.shape[1:]
    padded = F.pad(pixels, (0, max(0, size - width), 0, max(0, size - height)))
    places = [
        (top, left) for top in starts(padded.shape[1], size, stride) for left in starts(padded.shape[2], size, stride)
    ]
    summed, times = None, torch.zeros(padded.shape[1:], device=pixels.device)
    for first in range(0, len(places), batch_size):
        some = places[first : first + batch_size]
        windows = torch.stack([padded[:, top : top + size, left : left + size] for top, left in some])
        for (top, left), coarse in zip(some, predict(windows), strict=True):
            if summed is None:
                summed = torch.zeros(len(coarse), *padded.shape[1:], device=pixels.device)
            # One window at a time: C scores a pixel of many windows would not fit.
            summed[:, top : top + size, left : left + size] += _resized(coarse.float(), (size, size))
            times[top : top + size, left : left + size] += 1
    assert summed is not None
    return (summed / times)[:, :height, :width]


def averaged(predict: Callable[[Tensor], Tensor], images: Sequence[Tensor], flip: bool) -> Tensor:
    """Scores at the size of the first image.

    Args:
        predict: (3, h, w) -> (C, h, w) scores.
        images: (3, h, w) each, the same image at several scales.
        flip: predict the mirror images too.

    Returns:
        (C, H, W): the scores themselves for a single prediction, otherwise the mean of its probabilities.
    """
    if len(images) == 1 and not flip:
        return predict(images[0])
    size = (images[0].shape[1], images[0].shape[2])
    summed: Tensor | None = None
    for image in images:
        scores = [predict(image)] + ([predict(image.flip(-1)).flip(-1)] if flip else [])
        for one in scores:
            probabilities = _resized(one, size).softmax(dim=0)
            summed = probabilities if summed is None else summed + probabilities
    assert summed is not None
    return summed / (len(images) * (2 if flip else 1))


def classes_at(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, h, w) -> (*size) int64, the class with the highest score once these are enlarged; the first of equals."""
    if tuple(scores.shape[1:]) == size:
        return scores.argmax(dim=0)
    best = torch.full(size, -torch.inf, device=scores.device)
    found = torch.zeros(size, dtype=torch.int64, device=scores.device)
    some = max(1, ENLARGED_AT_ONCE // (size[0] * size[1]))
    for first in range(0, len(scores), some):
        highest, which = _resized(scores[first : first + some], size).max(dim=0)
        found = torch.where(highest > best, which + first, found)
        best = torch.maximum(best, highest)
    return found


def _resized(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, h, w) -> (C, *size)."""
    if tuple(scores.shape[1:]) == size:
        return scores
    return F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0]
