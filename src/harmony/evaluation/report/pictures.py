"""Images as data URIs, and images of what the encoder sees.

Shapes: B images, S px a side, N patches, D width.
"""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from harmony.chance import Chance
from harmony.data.masks import PatchSampler
from harmony.evaluation.encoders import TowersEncoder
from harmony.evaluation.report.html import Section, picture, row_of, tag
from harmony.models.vision import Segment
from harmony.objectives.mae import Mae
from harmony.schedules import Clock

LARGEST = 224
"""Side in px above which images are made smaller for the page."""

FINE = 24
"""Patches a side that images are enlarged to for their colour maps, unless they have more."""

GREY = 127
"""What removed patches are painted with."""


def data_uri(pixels: Tensor, side: int | None = None, quality: int = 85) -> str:
    """(3, S, S) uint8 as an embedded JPEG, made smaller when it is larger than `side` px."""
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())
    if side is not None and side < image.width:
        image = image.resize((side, side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def encoded_png(image: Image.Image, **settings: Any) -> str:
    """An image as an embedded PNG."""
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True, **settings)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def opened_png(encoded: str) -> NDArray[Any]:
    """(H, W) uint8, the values of a base64 PNG of one channel."""
    image = Image.open(io.BytesIO(base64.b64decode(encoded)))
    return np.array(image if image.mode in ("L", "P") else image.convert("L"))


def fine_size(encoder: TowersEncoder) -> int:
    """Side in px at which an image has enough patches for a colour map."""
    return max(encoder.size, FINE * encoder.towers.image.patch)


@torch.no_grad()
def patch_colours(encoders: Sequence[TowersEncoder], pixels: Tensor) -> Tensor:
    """The first three principal components of the patch features of several images, as colours.

    The components are those of all images' and all encoders' patches together, each encoder's taken from its own mean,
    so that a colour means the same direction in every picture. That is fair to a student and its teacher alone, an
    average of the student's past, whose features share their axes. Each component is stretched so that all but the
    outermost 2 % of the patches at either end lie within the range of a colour.

    Args:
        encoders: M of them, of one architecture.
        pixels: (B, 3, S, S) normalised.

    Returns:
        (M, B, 3, S, S) uint8.
    """
    tower = encoders[0].towers.image
    rows, columns = tower.grid(pixels.shape[-1])
    each = [encoder.towers.image.encode(pixels).patches.flatten(0, 1).double() for encoder in encoders]  # (B N, D)
    flat = torch.cat([features - features.mean(dim=0) for features in each])
    directions = torch.linalg.eigh(flat.T @ flat)[1][:, -3:].flip(1)  # the last are the largest
    # The sign of a direction is arbitrary; this choice makes the picture the same on every machine.
    strongest = directions.abs().argmax(dim=0)
    components = flat @ (directions * directions[strongest, range(directions.shape[1])].sign())
    low, high = components.quantile(0.02, dim=0), components.quantile(0.98, dim=0)
    colours = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    if colours.shape[1] < 3:  # features of one or two channels
        colours = F.pad(colours, (0, 3 - colours.shape[1]), value=0.5)
    maps = colours.view(-1, rows, columns, 3).permute(0, 3, 1, 2)
    large = F.interpolate(maps, pixels.shape[-2:], mode="bicubic", align_corners=False).clamp(0, 1)
    return (large * 255).round().to(torch.uint8).unflatten(0, (len(encoders), len(pixels)))


@torch.no_grad()
def reconstructions(encoder: TowersEncoder, mae: Mae, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Images with patches removed as at the end of training, and with these patches as the decoder predicts them.

    Args:
        encoder: the student's towers, which the decoder was trained with, on the CPU.
        mae: the objective that holds the decoder.
        pixels: (B, 3, S, S) normalised.

    Returns:
        (B, 3, S, S) uint8 twice.
    """
    tower = encoder.towers.image
    grid = tower.grid(pixels.shape[-1])
    sampler = mae.masks()["mae"]
    assert isinstance(sampler, PatchSampler)
    chance = Chance.of_examples(0, 0, torch.arange(len(pixels)))
    mask = sampler.draw("mae", chance, 1, grid, Clock(1, 1, 1))
    assert mask.kept is not None
    encoding = tower.encode_packed([Segment(pixels, keep=mask.kept[0])])[0]
    filled = mae.reconstruct(pixels[None], encoding.tokens[None], encoding.prefix, mask)[0]
    hidden = mask.masked[0].view(-1, 1, *grid).float()
    hidden = F.interpolate(hidden, pixels.shape[-2:], mode="nearest") > 0.5
    return encoder.denormalise(pixels).masked_fill(hidden, GREY), encoder.denormalise(filled)


def colour_section(originals: Sequence[Tensor], student: Tensor, teacher: Tensor) -> Section:
    """Images beside the colour maps of the student's and of the teacher's patch features."""
    rows = [
        row_of(
            (picture(data_uri(image, LARGEST), "validation image"), "image"),
            (picture(data_uri(ours, LARGEST), "the student's patch features as colours"), "student"),
            (picture(data_uri(slow, LARGEST), "the teacher's patch features as colours"), "teacher"),
        )
        for image, ours, slow in zip(originals, student, teacher, strict=True)
    ]
    lead = (
        "The patch features of these images, reduced to their first three principal components and shown as red, green "
        "and blue. The components are common to all images and to both models "
        "(each taken from its own mean), so that equal colours mean the same in all pictures. "
        "Images are enlarged for it, so that there are more patches than in training and the maps are finer."
    )
    return Section("features", "What the patches mean", tag("div", *rows, class_="triples"), lead)


def reconstruction_section(originals: Sequence[Tensor], masked: Tensor, filled: Tensor) -> Section:
    """Original, masked and reconstructed images in rows of three."""
    rows = [
        row_of(
            (picture(data_uri(original, LARGEST), "original"), "image"),
            (picture(data_uri(left, LARGEST), "what is left of it"), "what is seen"),
            (picture(data_uri(whole, LARGEST), "reconstruction"), "reconstruction"),
        )
        for original, left, whole in zip(originals, masked, filled, strict=True)
    ]
    lead = (
        "Validation images, what the encoder gets to see of them, and what the decoder makes of that. "
        "Where the recipe normalises its targets, predicted patches are given the mean and contrast of the true ones."
    )
    return Section("reconstructions", "Reconstructions", tag("div", *rows, class_="triples"), lead)
