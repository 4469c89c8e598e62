"""Where the class token looks: its attention in the last block, computed for the few images that are shown.

Training keeps no attention maps (a fused kernel never makes them), so they are made here from the queries and keys.
Shapes: B images, H heads, N tokens, h x w patches, S px a side.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention, Block
from torch import Tensor

from harmony.evaluation.report.html import Html, Section, joined, picture, row_of, tag
from harmony.evaluation.report.pictures import LARGEST, data_uri
from harmony.models.vision import ImageTower

HEADS, OF_IMAGES = 6, 2
"""Heads that are drawn by themselves, and for how many images."""

_MODELS = ("student", "teacher")

_HEAT = ((8, 6, 28), (74, 18, 104), (168, 44, 96), (240, 110, 52), (252, 238, 160))
"""Colours from no attention to most, equally far apart."""


@torch.no_grad()
def attention(tower: ImageTower, pixels: Tensor) -> Tensor:
    """How the class token divides its attention in the last block.

    Args:
        tower: in evaluation mode.
        pixels: (B, 3, S, S) normalised.

    Returns:
        (B, H, h, w): weights on the patches; with those on class and register tokens they sum to one.
    """
    block = cast(Block, tower.trunk.blocks[-1])
    attn = cast(Attention, block.attn)
    seen: list[Tensor] = []
    hook = attn.qkv.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        tower.encode(pixels)
    finally:
        hook.remove()
    qkv = seen[0].reshape(len(pixels), -1, 3, attn.num_heads, attn.head_dim)  # (B, N, 3, H, D / H)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q), attn.k_norm(k)
    weights = (q[:, :, :1] @ k.transpose(-2, -1) * attn.head_dim**-0.5).softmax(dim=-1)
    grid = (pixels.shape[-2] // tower.patch, pixels.shape[-1] // tower.patch)
    return weights[:, :, 0, tower.prefix :].unflatten(2, grid)


def heat(weights: Tensor, side: int, low: float, high: float) -> Tensor:
    """(h, w) weights as (3, side, side) uint8 colours, the darkest for `low` and less, the brightest for `high`."""
    large = F.interpolate(weights[None, None].float(), (side, side), mode="bilinear", align_corners=False)[0, 0]
    place = ((large - low) / max(high - low, 1e-12)).clamp(0, 1) * (len(_HEAT) - 1)
    below = place.floor().clamp(max=len(_HEAT) - 2)
    colours = torch.tensor(_HEAT, dtype=torch.float32)
    share = (place - below)[..., None]
    mixed = colours[below.long()] * (1 - share) + colours[below.long() + 1] * share
    return mixed.round().byte().permute(2, 0, 1)


def attention_section(originals: Sequence[Tensor], student: Tensor, teacher: Tensor) -> Section:
    """Images beside the maps of student and teacher, (B, H, h, w) each, and some heads of the teacher."""
    rows, strips = [], []
    for place, image in enumerate(originals):
        means = torch.stack([maps[place].mean(dim=0) for maps in (student, teacher)])
        shown = picture(data_uri(image, LARGEST), "validation image")
        maps = [_shown(mean, means, f"attention of the {who}") for mean, who in zip(means, _MODELS, strict=True)]
        rows.append(row_of((shown, "image"), *zip(maps, _MODELS, strict=True)))
        if place < OF_IMAGES:
            strips.append(_heads(image, teacher[place, :HEADS]))
    lead = (
        "How the class token divides its attention over the patches in the last block, mean over the heads: dark is "
        "least, bright is most. Student and teacher share the scale of an image, so that the one whose map is flatter "
        "does look more evenly; point at a map to read its range."
    )
    count = teacher.shape[1]
    which = f"{HEADS} of {count} heads" if count > HEADS else "Each head"
    heads = [tag("h3", f"{which} of the teacher by itself"), *strips] if count > 1 else []
    body = joined([tag("div", *rows, class_="triples"), *heads])
    return Section("attention", "Where the class token looks", body, lead)


def _heads(image: Tensor, maps: Tensor) -> Html:
    """The image and one map a head, each on its own scale."""
    shown = [_shown(one, one, f"head {head + 1}") for head, one in enumerate(maps)]
    return tag("div", picture(data_uri(image, LARGEST), "validation image"), *shown, class_="heads")


def _shown(weights: Tensor, scale: Tensor, alt: str) -> Html:
    """A map on the scale of those it is to be compared with, whose outermost patches do not count."""
    low, high = (float(scale.quantile(share)) for share in (0.01, 0.99))
    even = float(weights.mean())
    says = f"{alt}: {float(weights.min()) / even:.2f} to {float(weights.max()) / even:.2f} times an even share"
    return picture(data_uri(heat(weights, LARGEST, low, high)), alt, title=says)
