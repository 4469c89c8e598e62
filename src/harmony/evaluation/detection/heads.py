"""Box heads: one (Mask R-CNN, arXiv 1703.06870) or a cascade of three (Cascade R-CNN, arXiv 1712.00726).

Shapes: n regions of a batch, K classes, C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import box_iou, clip_boxes_to_image

from harmony.evaluation.detection.proposals import Target, in_crowd
from harmony.evaluation.detection.pyramid import pool

BOX_SIDE = 7
"""Side of a region's features as a box head sees them."""

NMS = 0.5
"""IoU from which on the lower-scored of two boxes of a class is left out."""

Sizes = list[tuple[int, int]]
"""Height and width in px of each image within its padded square."""


@dataclass(frozen=True)
class Stage:
    """One box head of a cascade: the IoU it learns to call a match, and the weights of its offsets."""

    iou: float
    weights: tuple[float, float, float, float]


STAGES = {
    "mask_rcnn": (Stage(0.5, (10, 10, 5, 5)),),
    "cascade": (Stage(0.5, (10, 10, 5, 5)), Stage(0.6, (20, 20, 10, 10)), Stage(0.7, (30, 30, 15, 15))),
}


@dataclass
class Sampled:
    """The regions of each image that the first stage learned from: their class (0 the ground) and their thing."""

    boxes: list[Tensor]
    labels: list[Tensor]
    matched: list[Tensor]


class BoxHead(nn.Module):
    """(n, C, 7, 7) -> logits (n, K + 1) and offsets (n, 4 * (K + 1)), or (n, 4) that are the same for all classes."""

    def __init__(self, channels: int, classes: int, agnostic: bool) -> None:
        super().__init__()
        self.agnostic = agnostic
        sides = (channels, BOX_SIDE, BOX_SIDE)
        self.features = FastRCNNConvFCHead(sides, [channels] * 4, [4 * channels], norm_layer=LayerNorm2d)
        self.classify = nn.Linear(4 * channels, classes + 1)
        self.refine = nn.Linear(4 * channels, 4 if agnostic else 4 * (classes + 1))
        # Left as PyTorch draws them: with weights as small as Fast R-CNN's, the offsets were still not learned after
        # some hundred steps, which is all that small data have.

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.features(x)
        return self.classify(x).float(), self.refine(x).float()


class BoxHeads(nn.Module):
    """The box heads of all stages; matching, sampling and box arithmetic are torchvision's.

    Args:
        kind: "mask_rcnn" or "cascade".
        channels, classes: C, K.
        strides: of the levels that are pooled, in px.
        regions: regions an image that are learned from.
        min_score, detections: what is found with less, or beyond this number, is left out.
    """

    def __init__(
        self,
        kind: str,
        channels: int,
        classes: int,
        strides: list[float],
        regions: int,
        min_score: float,
        detections: int,
    ) -> None:
        super().__init__()
        stages = STAGES[kind]
        self.strides = strides
        self.heads = nn.ModuleList(BoxHead(channels, classes, agnostic=len(stages) > 1) for _ in stages)
        # Each holds a stage's matcher, sampler and box arithmetic, and no weights.
        self.rules = [
            RoIHeads(None, None, None, s.iou, s.iou, regions, 0.25, s.weights, min_score, NMS, detections)
            for s in stages
        ]

    def losses(
        self, levels: list[Tensor], proposals: list[Tensor], sizes: Sizes, targets: list[Target]
    ) -> tuple[dict[str, Tensor], Sampled]:
        """The losses of every stage, and what the first one learned from, for the mask head."""
        proposals = [_outside_crowds(boxes, target) for boxes, target in zip(proposals, targets, strict=True)]
        boxes, matched, labels, offsets = self.rules[0].select_training_samples(proposals, targets)
        sampled = Sampled(boxes, labels, matched)
        losses: dict[str, Tensor] = {}
        for place, (head, rules) in enumerate(zip(self.heads, self.rules, strict=True)):
            if place:
                boxes, labels, offsets = _matched(rules, boxes, targets)
            logits, refined = head(self._shared_gradient(pool(levels, self.strides, boxes, BOX_SIDE)))
            classify, refine = _box_losses(logits, refined, torch.cat(labels), torch.cat(list(offsets)))
            losses |= {f"classify{place}": classify, f"refine{place}": refine}
            if place + 1 < len(self.heads):
                boxes = _refined(rules, refined.detach(), boxes, sizes)
                boxes = [box[(box[:, 2:] > box[:, :2]).all(1)] for box in boxes]
        return losses, sampled

    def detect(self, levels: list[Tensor], boxes: list[Tensor], sizes: Sizes) -> list[dict[str, Tensor]]:
        """What is found on each image: boxes (n, 4), labels (n,) from 1, scores (n,), best first.

        The classes' scores are the mean over stages, each looking where the one before it pointed (1712.00726, 4.3).
        """
        scores: list[Tensor] = []
        for place, (head, rules) in enumerate(zip(self.heads, self.rules, strict=True)):
            logits, refined = head(pool(levels, self.strides, boxes, BOX_SIDE))
            scores.append(logits.softmax(1))
            if place + 1 < len(self.heads):
                boxes = _refined(rules, refined, boxes, sizes)
        mean = torch.stack(scores).mean(0)
        if refined.shape[1] == 4:
            refined = refined.repeat(1, mean.shape[1])
        # torchvision takes logits, and the softmax of logarithms of shares is the shares.
        found = rules.postprocess_detections(mean.clamp(min=1e-30).log(), refined, boxes, sizes)
        return [{"boxes": b, "scores": s, "labels": label} for b, s, label in zip(*found, strict=True)]

    def _shared_gradient(self, x: Tensor) -> Tensor:
        """Let the stages, all of one weight, move the pyramid as much together as one alone would."""
        share = 1 / len(self.heads)
        return x if share == 1 else share * x + (1 - share) * x.detach()


def _outside_crowds(boxes: Tensor, target: Target) -> Tensor:
    """Without the regions in crowds that match no thing: they are no examples of the ground."""
    if not len(target["crowd"]):
        return boxes
    away = in_crowd(boxes, target["crowd"])
    if len(target["boxes"]):
        away &= box_iou(boxes, target["boxes"]).amax(1) < STAGES["mask_rcnn"][0].iou
    return boxes[~away]


def _matched(
    rules: RoIHeads, boxes: list[Tensor], targets: list[Target]
) -> tuple[list[Tensor], list[Tensor], Sequence[Tensor]]:
    """Regions as the stage before left them, all of them, with the classes and offsets that this stage is to learn."""
    things = [target["boxes"] for target in targets]
    matched, labels = rules.assign_targets_to_proposals(boxes, things, [target["labels"] for target in targets])
    none = boxes[0].new_zeros(1, 4)
    towards = [(box if len(box) else none)[match] for box, match in zip(things, matched, strict=True)]
    return boxes, labels, rules.box_coder.encode(towards, boxes)


def _refined(rules: RoIHeads, offsets: Tensor, boxes: list[Tensor], sizes: Sizes) -> list[Tensor]:
    """Boxes moved by offsets that are the same for all classes, kept on their images."""
    moved = rules.box_coder.decode(offsets, boxes).reshape(-1, 4).split([len(box) for box in boxes])
    return [clip_boxes_to_image(box, size) for box, size in zip(moved, sizes, strict=True)]


def _box_losses(logits: Tensor, refined: Tensor, labels: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy over regions, and smooth L1 of the things' offsets over the number of all regions."""
    count = max(1, len(labels))
    things = torch.where(labels > 0)[0]
    each = refined.unflatten(1, (-1, 4))
    own = each[things, labels[things] if each.shape[1] > 1 else torch.zeros_like(things)]
    refine = F.smooth_l1_loss(own, offsets[things], beta=1 / 9, reduction="sum") / count
    return F.cross_entropy(logits, labels, reduction="sum") / count, refine
