"""A trained head measured on whole images, and what the report shows of it."""

import base64
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from harmony import ranks
from harmony.errors import UserError
from harmony.evaluation.crops import spread, tell_bad
from harmony.evaluation.segmentation.data import Pictures, resize_mask, size_at
from harmony.evaluation.segmentation.heads import Segmenter
from harmony.evaluation.segmentation.inference import averaged, classes_at, slide, stride_of
from harmony.evaluation.segmentation.scores import IGNORE, Confusion
from harmony.evaluation.task import Setup
from harmony.training.distributed import everyones

EXAMPLES = 6
"""Images whose masks are kept for the report."""

LONGEST = 256
"""Longest side of these masks in px."""

UNLABELLED = 255
"""The value in these masks of pixels that belong to no class."""


@dataclass(frozen=True)
class Measured:
    """What was found on the images of a source, over all ranks.

    Attributes:
        confusion: counts of pixels.
        images: how many images were measured.
        bad: (key, reason) of those that could not be.
        examples: for the report, see `example`.
    """

    confusion: Confusion
    images: int
    bad: list[tuple[str, str]]
    examples: list[dict[str, Any]]


def short_side(setup: Setup) -> int | None:
    """The shorter side that images are resized to; None leaves them as they are."""
    wanted = setup.config.segmentation.short_side
    return setup.size if wanted == "size" else wanted


def positions_of(setup: Setup) -> Sequence[int]:
    """The examples of `setup.data` that are measured."""
    return spread(len(setup.data), setup.config.max_examples)


@torch.no_grad()
def measure(segmenter: Segmenter, setup: Setup) -> Measured:
    """Predict the images of `setup.data`, each rank a share of them.

    Raises:
        UserError: no image can be used, or the scores are not finite.
    """
    config, device = setup.config.segmentation, setup.encoder.device
    positions = positions_of(setup)
    shown = {positions[place] for place in spread(len(positions), EXAMPLES)}
    # Scores are averaged at the first scale's size: that nearest to 1, whatever the order they are given in.
    scales = sorted(config.test_scales, key=lambda scale: abs(math.log(scale)))
    mine = positions[ranks.rank() :: ranks.count()]
    pictures = Pictures(setup.data, mine, short_side(setup), scales, setup.max_pixels)
    confusion = Confusion(len(setup.data.mask_names or []), device)
    images, broken = 0, 0
    bad: list[tuple[str, str]] = []
    examples: list[dict[str, Any]] = []
    for picture in pictures.loaded(setup.config.workers, f"segmenting {len(positions):,} images"):
        if picture.mask is None:
            bad.append(picture.bad)
            continue
        truth = picture.mask.to(device)
        scores = predict(segmenter, setup, [pixels.to(device) for pixels in picture.pixels])
        broken += not scores.isfinite().all()
        found = classes_at(scores, tuple(truth.shape))
        confusion.add(truth, found)
        images += 1
        if picture.position in shown:
            examples.append(example(picture.position, truth, found))
    # Nothing above ends one rank alone, which would leave the others waiting here.
    everything = everyones((images, broken, bad, examples))
    tell_bad(setup.data.uri, [one for part in everything for one in part[2]], len(positions), "used")
    if any(part[1] for part in everything):
        raise UserError("the scores of some pixels are not finite; the encoder's weights are damaged, use another one")
    return Measured(
        confusion.gathered(),
        sum(part[0] for part in everything),
        [one for part in everything for one in part[2]],
        sorted((one for part in everything for one in part[3]), key=lambda one: int(one["position"])),
    )


def predict(segmenter: Callable[[Tensor], Tensor], setup: Setup, scales: list[Tensor]) -> Tensor:
    """(C, h, w) scores of an image that is given at several scales, (3, h, w) uint8; of the size of the first."""
    config, encoder = setup.config.segmentation, setup.encoder
    stride = stride_of(setup.size, config.stride, encoder.patch)
    window = partial(slide, segmenter, size=setup.size, stride=stride, batch_size=setup.config.batch_size)
    with torch.autocast(encoder.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        return averaged(window, [encoder.normalise(pixels) for pixels in scales], config.test_flip)


def example(position: int, truth: Tensor, predicted: Tensor) -> dict[str, Any]:
    """For the report: an image's place in the source, its size, and both masks.

    A mask is a base64 PNG of at most `LONGEST` px a side, 8 bits a pixel: the class index, `UNLABELLED` for no class.
    With more classes than that masks are left out.
    """
    height, width = truth.shape
    size = size_at(height, width, None, min(1.0, LONGEST / max(height, width)))
    small = [resize_mask(mask.cpu().int(), size) for mask in (truth, predicted)]
    about: dict[str, Any] = {"position": position, "height": height, "width": width}
    if max(int(mask.max()) for mask in small) < UNLABELLED:
        about |= {"truth": _png(small[0]), "predicted": _png(small[1])}
    return about


def _png(mask: Tensor) -> str:
    file = BytesIO()
    Image.fromarray(mask.masked_fill(mask == IGNORE, UNLABELLED).to(torch.uint8).numpy()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
