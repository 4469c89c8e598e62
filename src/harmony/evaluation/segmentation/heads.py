"""What gives every pixel a score for each class: linear layers on frozen patches, or the text tower's reading.

Shapes: B images, C classes, D width of a token, h x w patches, E width of the space shared with texts.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmony import ranks
from harmony.errors import UserError
from harmony.evaluation.encoder import Encoder
from harmony.evaluation.segmentation.scores import IGNORE

MULTI_LAYERS = 4
"""Blocks that multi_linear reads; all of them where an encoder has fewer."""


class Segmenter(nn.Module):
    """What all heads offer. Its state is what is trained."""

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) normalised -> (B, C, h, w) scores, on a grid as coarse as the head makes it."""
        raise NotImplementedError

    def loss(self, pixels: Tensor, masks: Tensor) -> Tensor:
        """Cross-entropy of the scores enlarged to the masks (B, H, W)."""
        return pixel_loss(self(pixels), masks)


def pixel_loss(scores: Tensor, masks: Tensor) -> Tensor:
    """Mean cross-entropy over the pixels, of all ranks, that belong to a class; zero where there are none.

    Args:
        scores: (B, C, h, w), enlarged to the masks bilinearly.
        masks: (B, H, W) integers, 0 .. C - 1 or `IGNORE`.
    """
    enlarged = F.interpolate(scores.float(), masks.shape[1:], mode="bilinear", align_corners=False)
    summed = F.cross_entropy(enlarged, masks.long(), ignore_index=IGNORE, reduction="sum")
    # Divided by the same number on every rank, so that the mean over ranks is the mean over all pixels.
    return summed / ranks.mean((masks != IGNORE).sum().float()).clamp(min=1)


class LinearSegmenter(Segmenter):
    """Batch norm and a 1 x 1 convolution on patches of the frozen encoder (DINOv2, arXiv 2304.07193, section 7.4).

    Args:
        encoder: frozen; not part of the state.
        layers: how many of its last blocks are put side by side.
        channels: width of these together, as `patch_width` finds it.
        classes: C.
    """

    def __init__(self, encoder: Encoder, layers: int, channels: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.layers = layers
        self.norm = nn.BatchNorm2d(channels)
        self.classify = nn.Conv2d(channels, classes, 1)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.zeros_(cast(Tensor, self.classify.bias))

    def forward(self, pixels: Tensor) -> Tensor:
        scores: Tensor = self.classify(self.norm(patch_maps(self.encoder, pixels, self.layers)))
        return scores


def patch_maps(encoder: Encoder, pixels: Tensor, layers: int) -> Tensor:
    """(B, layers * D, h, w), the last blocks' patches side by side; coarser maps are enlarged to the finest."""
    maps = [layer.patches.float() for layer in encoder.encode(pixels, layers).layers]
    finest = max((one.shape[-2:] for one in maps), key=lambda grid: grid[0] * grid[1])
    return torch.cat(
        [one if one.shape[-2:] == finest else F.interpolate(one, finest, mode="bilinear") for one in maps], dim=1
    )


def patch_width(encoder: Encoder, size: int, layers: int) -> int:
    """Channels of `patch_maps`, found by encoding an empty image.

    Raises:
        UserError: the encoder gives no patch maps, or takes no input of this size.
    """
    blank = torch.zeros(1, 3, size, size, device=encoder.device)
    given = encoder.encode(blank, layers).layers
    if len(given) != layers or any(layer.patches.ndim != 4 for layer in given):
        raise UserError(f"segmentation needs patch maps, and {encoder.name} gives none; evaluate a plain ViT")
    if size > encoder.patch and given[-1].patches.shape[-2:] == (1, 1):
        raise UserError(
            f"{encoder.name} gives one vector for a whole image of {size} px; segmentation needs a map of patches, "
            "evaluate a plain ViT or set a larger size"
        )
    return sum(layer.patches.shape[1] for layer in given)
