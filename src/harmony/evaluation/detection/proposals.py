"""Regions that may hold a thing: torchvision's region proposal network on the pyramid (arXiv 1506.01497)."""

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

RATIOS = (0.5, 1.0, 2.0)
"""Height over width of the anchors."""

IN_CROWD = 0.5
"""Share of a region that lies in a crowd from which on it is no example of the ground."""

Target = dict[str, Tensor]
"""Things of an image: boxes (K, 4) px, labels (K,) from 1, crowd (J, 4) boxes of crowds, masks (K, S, S) or none."""


class Anchors(AnchorGenerator):
    """torchvision's anchors, at strides that need not be whole (those of patches of 14 px are not)."""

    def __init__(self, sides: list[float], strides: list[float]) -> None:
        super().__init__(tuple((side,) for side in sides), (RATIOS,) * len(sides))
        self.strides = strides

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        grids = [list(level.shape[-2:]) for level in feature_maps]
        each = torch.cat(self.grid_anchors(grids, [[stride, stride] for stride in self.strides]))
        return [each] * len(image_list.image_sizes)

    def generate_anchors(
        self,
        scales: list[float],
        aspect_ratios: list[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """As torchvision's, but not rounded to whole pixels: small images have small anchors."""
        side, ratio = torch.tensor(scales, dtype=dtype, device=device), torch.tensor(aspect_ratios, device=device)
        high, wide = (side[None] * ratio[:, None].sqrt()).flatten(), (side[None] / ratio[:, None].sqrt()).flatten()
        return torch.stack([-wide, -high, wide, high], 1) / 2


class FullPrecisionHead(RPNHead):
    """torchvision's head, whose coordinates leave bf16 before they are used: it has no room for pixels above 256."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, offsets = super().forward(x)
        return [each.float() for each in logits], [each.float() for each in offsets]


class Proposals(RegionProposalNetwork):
    """torchvision's network; what lies in a crowd is no example of the ground."""

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[Target]
    ) -> tuple[list[Tensor], list[Tensor]]:
        labels, matched = super().assign_targets_to_anchors(anchors, targets)
        for label, anchor, target in zip(labels, anchors, targets, strict=True):
            away = (label == 0) & in_crowd(anchor, target["crowd"])
            if (~away & (label >= 0)).any():  # else nothing is left to sample, and the mean over nothing is no number
                label[away] = -1  # neither thing nor ground
        return labels, matched


def build_proposals(channels: int, sides: list[float], strides: list[float], kept: int) -> Proposals:
    """The network with ViTDet's settings.

    Args:
        channels: of the pyramid.
        sides: of the anchors, one a level, in px.
        strides: of the levels, in px.
        kept: regions an image that are proposed.
    """
    return Proposals(
        Anchors(sides, strides),
        FullPrecisionHead(channels, len(RATIOS), conv_depth=2),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2 * kept, "testing": kept},
        post_nms_top_n={"training": kept, "testing": kept},
        nms_thresh=0.7,
    )


def in_crowd(boxes: Tensor, crowd: Tensor) -> Tensor:
    """(n, 4) boxes, (J, 4) crowds -> (n,) bool, whether half of a box or more lies in one crowd."""
    if not len(crowd):
        return torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    corner = torch.maximum(boxes[:, None, :2], crowd[:, :2])
    sides = (torch.minimum(boxes[:, None, 2:], crowd[:, 2:]) - corner).clamp(min=0)
    area = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)
    return sides.prod(2).amax(1) >= IN_CROWD * area.clamp(min=1e-6)
