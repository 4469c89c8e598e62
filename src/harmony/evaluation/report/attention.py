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


def heat(weights: Tensor, side: int, top: float) -> Tensor:
    """(h, w) weights as (3, side, side) uint8 colours, of which the brightest stands for `top` and more."""
    large = F.interpolate(weights[None, None].float(), (side, side), mode="bilinear", align_corners=False)[0, 0]
    place = (large / max(top, 1e-12)).clamp(0, 1) * (len(_HEAT) - 1)
    low = place.floor().clamp(max=len(_HEAT) - 2)
    colours = torch.tensor(_HEAT, dtype=torch.float32)
    share = (place - low)[..., None]
    mixed = colours[low.long()] * (1 - share) + colours[low.long() + 1] * share
    return mixed.round().byte().permute(2, 0, 1)


def attention_section(originals: Sequence[Tensor], student: Tensor, teacher: Tensor) -> Section:
    """Images beside the maps of student and teacher, (B, H, h, w) each, and some heads of the teacher."""
    rows, strips = [], []
    for place, image in enumerate(originals):
        means = [maps[place].mean(dim=0) for maps in (student, teacher)]
        top = max(float(mean.quantile(0.995)) for mean in means)
        both = [_shown(mean, top, f"attention of the {who}") for mean, who in zip(means, _MODELS, strict=True)]
        shown = picture(data_uri(image, LARGEST), "validation image")
        rows.append(row_of((shown, "image"), *zip(both, _MODELS, strict=True)))
        if place < OF_IMAGES:
            strips.append(_heads(image, teacher[place, :HEADS]))
    lead = (
        "How the class token divides its attention over the patches in the last block, mean over the heads. "
        "Bright is much; student and teacher of an image share one scale."
    )
    count = teacher.shape[1]
    which = f"{min(HEADS, count)} of {count} heads" if count > HEADS else "Each head"
    heads = [tag("h3", f"{which} of the teacher by itself"), *strips] if count > 1 else []
    body = joined([tag("div", *rows, class_="triples"), *heads])
    return Section("attention", "Where the class token looks", body, lead)


def _heads(image: Tensor, maps: Tensor) -> Html:
    """The image and one map a head, each on its own scale."""
    shown = [_shown(one, float(one.quantile(0.995)), f"head {head + 1}") for head, one in enumerate(maps)]
    return tag("div", picture(data_uri(image, LARGEST), "validation image"), *shown, class_="heads")


def _shown(weights: Tensor, top: float, alt: str) -> Html:
    return picture(data_uri(heat(weights, LARGEST, top)), alt)
