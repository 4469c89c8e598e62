"""Who was taken for whom, pixel by pixel, and the scores that follow from it.

Shapes: C classes, H x W pixels of an image.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from harmony import ranks

IGNORE = -1
"""The value in a mask, as it is used here, of pixels that belong to no class."""

CHUNK = 2**24
"""Pixels counted at a time, which bounds the memory that counting takes."""


class Confusion:
    """Counts of pixels by true and by predicted class.

    Attributes:
        counts: (C, C) int64, rows true, columns predicted.
        ignored: pixels that belong to no class; what is predicted for them does not count.
    """

    def __init__(self, classes: int, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(classes, classes, dtype=torch.int64, device=device)
        self.ignored = 0

    def add(self, truth: Tensor, predicted: Tensor) -> None:
        """Count pixels.

        Args:
            truth: (H, W) integers, 0 .. C - 1 or `IGNORE`.
            predicted: (H, W) integers, 0 .. C - 1.
        """
        classes = len(self.counts)
        for true, found in zip(truth.flatten().split(CHUNK), predicted.flatten().split(CHUNK), strict=True):
            valid = true != IGNORE
            pairs = true[valid].long() * classes + found[valid].long()
            self.counts += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
            self.ignored += int(len(true) - valid.sum())

    def gathered(self) -> "Confusion":
        """The sum over ranks, on the CPU."""
        summed = Confusion(len(self.counts))
        summed.counts = ranks.total(self.counts).cpu()
        summed.ignored = int(ranks.total(torch.tensor(self.ignored, device=self.counts.device)))
        return summed

    def iou(self) -> Tensor:
        """(C,) float64: pixels right over those that are of a class or taken for it; NaN where there are neither."""
        right = self.counts.diag().double()
        return right / (self.counts.sum(0) + self.counts.sum(1) - self.counts.diag())

    def accuracy(self) -> Tensor:
        """(C,) float64: share of each class's pixels that are right; NaN for a class without pixels."""
        return self.counts.diag().double() / self.counts.sum(1)

    def scores(self) -> dict[str, float]:
        """Mean IoU, mean accuracy over classes, and pixel accuracy.

        A class that is neither there nor predicted is left out of the mean IoU, a class that is not there out of the
        mean accuracy.
        """
        return {
            "miou": self.iou().nanmean().item(),
            "mean_accuracy": self.accuracy().nanmean().item(),
            "pixel_accuracy": (self.counts.diag().sum().double() / self.counts.sum()).item(),
        }

    def always(self, guess: int) -> "Confusion":
        """What it would be if every pixel were taken for the class `guess`."""
        constant = Confusion(len(self.counts))
        constant.counts[:, guess] = self.counts.sum(1)
        return constant

    def classes(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """For the report: every class with its pixels, IoU and accuracy, which are None where they are undefined."""
        return [
            {"name": name, "pixels": pixels, "iou": _known(iou), "accuracy": _known(accuracy)}
            for name, pixels, iou, accuracy in zip(
                names, self.counts.sum(1).tolist(), self.iou().tolist(), self.accuracy().tolist(), strict=True
            )
        ]


def _known(value: float) -> float | None:
    return value if value == value else None
