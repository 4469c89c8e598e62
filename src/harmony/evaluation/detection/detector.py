"""The detector: ViT, pyramid, proposals, boxes, and masks where the data have them."""

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from harmony.evaluation.detection.heads import BoxHeads, Sizes
from harmony.evaluation.detection.masks import MaskHead
from harmony.evaluation.detection.proposals import Target, build_proposals
from harmony.evaluation.detection.pyramid import SimplePyramid, strides
from harmony.evaluation.detection.windows import WindowedViT
from harmony.evaluation.settings import DetectionConfig


class Detector(nn.Module):
    """Things on images.

    Args:
        trunk: the encoder, as a map.
        classes: number of classes.
        size: S, side in px of the images.
        with_masks: whether it finds masks too.
        config: the task's settings.
    """

    def __init__(self, trunk: WindowedViT, classes: int, size: int, with_masks: bool, config: DetectionConfig) -> None:
        super().__init__()
        of_levels = strides(trunk.patch)
        self.trunk = trunk
        self.pyramid = SimplePyramid(trunk.width, config.channels)
        self.proposals = build_proposals(
            config.channels, [share * size for share in config.anchors], of_levels, config.proposals
        )
        self.boxes = BoxHeads(
            config.head,
            config.channels,
            classes,
            of_levels[:-1],
            config.regions,
            config.min_score,
            config.detections,
        )
        self.masks = MaskHead(config.channels, classes, of_levels[:-1]) if with_masks else None

    def losses(self, pixels: Tensor, sizes: Sizes, targets: list[Target]) -> dict[str, Tensor]:
        """The losses of images (B, 3, S, S), normalised, of heights and widths `sizes` within their squares."""
        levels = self.pyramid(self.trunk(pixels))
        proposals, losses = self.proposals(ImageList(pixels, sizes), _named(levels), targets)
        of_boxes, sampled = self.boxes.losses(levels[:-1], proposals, sizes, targets)
        losses = dict(losses) | of_boxes
        if self.masks is not None:
            losses["masks"] = self.masks.loss(levels[:-1], sampled, targets)
        return losses

    @torch.no_grad()
    def detect(self, pixels: Tensor, sizes: Sizes) -> list[dict[str, Tensor]]:
        """What is found on each image: boxes (n, 4) px, labels (n,) from 1, scores (n,), masks (n, 28, 28) or none."""
        levels = self.pyramid(self.trunk(pixels))
        proposals, _ = self.proposals(ImageList(pixels, sizes), _named(levels))
        found = self.boxes.detect(levels[:-1], proposals, sizes)
        if self.masks is not None:
            labels = torch.cat([each["labels"] for each in found])
            masks = self.masks(levels[:-1], [each["boxes"] for each in found], labels).sigmoid()
            for each, own in zip(found, masks.split([len(each["labels"]) for each in found]), strict=True):
                each["masks"] = own
        return found


def _named(levels: list[Tensor]) -> dict[str, Tensor]:
    return {str(place): level for place, level in enumerate(levels)}
