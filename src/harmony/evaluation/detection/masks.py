"""The mask head (Mask R-CNN, arXiv 1703.06870, section 3), and masks put back on their images.

Shapes: n regions, K classes, C channels.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import roi_align

from harmony.evaluation.detection.heads import Sampled
from harmony.evaluation.detection.proposals import Target
from harmony.evaluation.detection.pyramid import pool

POOLED_SIDE = 14
"""Side of a region's features as the mask head sees them; a mask has twice as many."""


class MaskHead(nn.Module):
    """Masks of regions; of each region for its class alone."""

    def __init__(self, channels: int, classes: int, strides: list[float]) -> None:
        super().__init__()
        self.strides = strides
        self.features = MaskRCNNHeads(channels, [channels] * 4, 1, norm_layer=LayerNorm2d)
        self.predict = MaskRCNNPredictor(channels, channels, classes + 1)

    def forward(self, levels: list[Tensor], boxes: list[Tensor], labels: Tensor) -> Tensor:
        """Logits of the masks within boxes, for the class of each: (n, 28, 28)."""
        masks = self.predict(self.features(pool(levels, self.strides, boxes, POOLED_SIDE))).float()
        return masks[torch.arange(len(labels), device=labels.device), labels]

    def loss(self, levels: list[Tensor], sampled: Sampled, targets: list[Target]) -> Tensor:
        """Mean binary cross entropy over the regions that match a thing; zero without any."""
        at = [torch.where(labels > 0)[0] for labels in sampled.labels]
        boxes = [box[place] for box, place in zip(sampled.boxes, at, strict=True)]
        labels = torch.cat([label[place] for label, place in zip(sampled.labels, at, strict=True)])
        logits = self(levels, boxes, labels)
        wanted = [
            masks_within(target["masks"], matched[place], box, logits.shape[-1])
            for target, matched, place, box in zip(targets, sampled.matched, at, boxes, strict=True)
        ]
        total = F.binary_cross_entropy_with_logits(logits, torch.cat(wanted), reduction="sum")
        return total / max(1, logits.numel())


def masks_within(masks: Tensor, which: Tensor, boxes: Tensor, side: int) -> Tensor:
    """The parts of masks (K, S, S) that lie in boxes (n, 4) of things `which` (n,): (n, side, side), 0 or 1."""
    if not len(boxes):
        return boxes.new_zeros(0, side, side)
    rois = torch.cat([which[:, None].to(boxes), boxes], 1)
    return (roi_align(masks[:, None].to(boxes), rois, side, aligned=True)[:, 0] >= 0.5).float()


def paste(mask: Tensor, box: Tensor, height: int, width: int) -> NDArray[np.uint8]:
    """A region's mask on its image.

    Args:
        mask: (side, side), probabilities over the box.
        box: (4,) px of the image, on the image.
        height: of the image in px.
        width: likewise.

    Returns:
        (height, width) uint8, 0 or 1, in column order as run lengths are counted.
    """
    left, top, right, bottom = box.tolist()
    whole: NDArray[np.uint8] = np.zeros((height, width), dtype=np.uint8, order="F")
    # The pixels whose centres lie in the box.
    x0, y0 = (max(0, math.ceil(side - 0.5)) for side in (left, top))
    x1, y1 = min(width, math.ceil(right - 0.5)), min(height, math.ceil(bottom - 0.5))
    if x1 <= x0 or y1 <= y0:
        return whole
    x = (torch.arange(x0, x1) + 0.5 - left) / (right - left) * 2 - 1
    y = (torch.arange(y0, y1) + 0.5 - top) / (bottom - top) * 2 - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None].to(mask)
    # The border is repeated, or a mask would fade within half a cell of its box.
    fine = F.grid_sample(mask[None, None], grid, padding_mode="border", align_corners=False)[0, 0]
    whole[y0:y1, x0:x1] = (fine >= 0.5).numpy()
    return whole
