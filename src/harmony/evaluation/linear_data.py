"""What the linear probe learns from and is measured on: labelled features, the held-out split, a probe's inputs.

Shapes: N labelled images, L last blocks, D width of a token, C classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from harmony.evaluation.features import ImageFeatures
from harmony.evaluation.labelled import labelled_pair
from harmony.evaluation.seeds import seeded
from harmony.evaluation.task import Setup


@dataclass(frozen=True)
class Probed:
    """The labelled examples of a source with all features that a probe may see, in memory.

    Attributes:
        cls: (N, L, D), the class token after each of the last blocks, the very last one at the end.
        patches: (N, D), the mean of the last block's patch tokens.
        labels: (N,) int64.
        indices: (N,) int64, positions in the source.
        unlabelled, bad: how many examples were left out for want of a label, or because they cannot be read.
    """

    cls: Tensor
    patches: Tensor
    labels: Tensor
    indices: Tensor
    unlabelled: int
    bad: int

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of(cls, images: ImageFeatures) -> "Probed":
        kept = images.labels >= 0
        unlabelled = int((~kept).sum())
        if not unlabelled:  # spares a copy of everything
            return cls(images.cls, images.patches, images.labels, images.indices, 0, len(images.bad))
        own = (images.cls[kept], images.patches[kept], images.labels[kept], images.indices[kept])
        return cls(*own, unlabelled, len(images.bad))


def train_and_test(setup: Setup) -> tuple[Probed, Probed, list[str]]:
    """What is learned from, what is measured on, and the names of the C classes; raises as `labelled_pair` does."""
    train, test, names = labelled_pair(setup)
    return Probed.of(train.images), Probed.of(test.images), names


def split(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Positions to fit on and positions held out, each ascending; a share of every class, drawn at random.

    Of a class with several images at least one is held out and at least one is not; a single image is fitted on.

    Args:
        labels: (N,) of the training images.
        share: of a class's images that is held out.
        seed: of the draw.
    """
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    with seeded("linear split", seed):
        order = torch.randperm(len(labels))
    for label in labels.unique():
        own = order[labels[order] == label]
        if len(own) > 1:
            held_out[own[: min(len(own) - 1, max(1, round(share * len(own))))]] = True
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]


@dataclass(frozen=True)
class Inputs:
    """Which features a probe sees.

    Attributes:
        layers: how many of the last blocks' class tokens.
        pooling: "cls", or "cls_and_mean" for the last block's mean patch besides.
    """

    layers: int
    pooling: str

    def of(self, cls: Tensor, patches: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """(N, L, D) class tokens and (N, D) mean patches -> (N, layers * D), or (N, (layers + 1) * D).

        Args:
            cls: class tokens of all images.
            patches: mean patches of all images.
            rows: the images wanted; nothing else is copied.
        """
        tokens = cls[:, -self.layers :][rows].flatten(1)
        return tokens if self.pooling == "cls" else torch.cat([tokens, patches[rows]], dim=1)
