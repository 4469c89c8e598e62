"""The simple feature pyramid: maps of several strides from a ViT's last map alone (ViTDet, arXiv 2203.16527, 3).

Shapes: B images, h x w patches, D width of the ViT, C channels.
"""

from typing import Final

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import roi_align

SCALES: Final = (4, 2, 1, 0.5)
"""Size of each map relative to the map of patches; a last level, half as large again, serves the proposals alone."""


class SimplePyramid(nn.Module):
    """(B, D, h, w) -> float32 maps of C channels: 4h x 4w, 2h x 2w, h x w, h/2 x w/2 and h/4 x w/4 (rounded up)."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        half, quarter = max(1, width // 2), max(1, width // 4)
        self.resize = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(width, half, 2, 2),
                    LayerNorm2d(half),
                    nn.GELU(),
                    nn.ConvTranspose2d(half, quarter, 2, 2),
                ),
                nn.ConvTranspose2d(width, half, 2, 2),
                nn.Identity(),
                nn.MaxPool2d(2, 2, ceil_mode=True),  # of an odd grid, the last row and column count too
            ]
        )
        self.merge = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(into, channels, 1, bias=False),
                    LayerNorm2d(channels),
                    nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                    LayerNorm2d(channels),
                )
                for into in (quarter, half, width, width)
            ]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        levels = [merge(resize(x)).float() for resize, merge in zip(self.resize, self.merge, strict=True)]
        return [*levels, F.max_pool2d(levels[-1], 1, 2)]


def strides(patch: int) -> list[float]:
    """Stride in px of the five levels."""
    return [patch / scale for scale in SCALES] + [2 * patch / SCALES[-1]]


def pool(levels: list[Tensor], level_strides: list[float], boxes: list[Tensor], size: int) -> Tensor:
    """What lies in the boxes, brought to one size (RoIAlign), each from the level that suits its size.

    Box sides of 14 cells are taken from the level one below those of 28 and so on (FPN, arXiv 1612.03144, equation 1,
    with its 224 px at stride 16). torchvision's MultiScaleRoIAlign takes strides to be powers of two, and patches of
    14 px are none; and it is half a cell off, as its `aligned` is not to be set.

    Args:
        levels: (B, C, ., .) each, finest first.
        level_strides: of these levels, in px.
        boxes: (n, 4) for each of the B images, in px.
        size: side of the result.

    Returns:
        (sum of n, C, size, size) float32.
    """
    joined = torch.cat(boxes)
    image = torch.cat([box.new_full((len(box), 1), place) for place, box in enumerate(boxes)])
    rois = torch.cat([image, joined], 1)
    sides = ((joined[:, 2] - joined[:, 0]) * (joined[:, 3] - joined[:, 1])).clamp(min=1e-6).sqrt()
    wanted = torch.log2(sides / (14 * level_strides[0]) + 1e-6).floor().clamp(0, len(levels) - 1)
    out = levels[0].new_zeros(len(rois), levels[0].shape[1], size, size)
    for place, (level, stride) in enumerate(zip(levels, level_strides, strict=True)):
        here = torch.where(wanted == place)[0]
        out = out.index_copy(0, here, roi_align(level, rois[here], size, 1 / stride, sampling_ratio=2, aligned=True))
    return out
