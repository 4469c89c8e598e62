"""What every classification task reports: accuracies with their chance levels, and what the report shows of classes.

Shapes: N images, C classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from harmony.errors import UserError
from harmony.evaluation.ranking import recall

MOST_CLASSES_IN_CONFUSION = 100
"""Larger confusion matrices are not kept: nobody can read them."""


def require_named(highest: int, names: Sequence[str], uri: str) -> None:
    """UserError when the highest label of a source has no name."""
    if highest >= len(names):
        raise UserError(
            f"{uri} has the label {highest} but only {len(names)} class names (labels count from 0); "
            "give it one name a class"
        )


def ranks_of(scores: Tensor, labels: Tensor) -> Tensor:
    """(N,) int64, the rank of the true class by its score, 1 is best; ties and what is not a number count against.

    Args:
        scores: (N, C) float.
        labels: (N,) the true class.
    """
    own = scores.gather(1, labels[:, None])
    return (~(scores < own)).sum(dim=1).clamp(min=1)


def taken_for(scores: Tensor, labels: Tensor, ranks: Tensor) -> Tensor:
    """(N,) the class each image is taken for: the true one where it is first, else the best of the others.

    So what is shown class by class agrees with the accuracies, which count a tie against.

    Args:
        scores: (N, C) float.
        labels: (N,) the true class.
        ranks: (N,) its rank.
    """
    others = scores.scatter(1, labels[:, None], float("-inf")).argmax(dim=1)
    return torch.where(ranks == 1, labels, others)


def accuracy(ranks: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """Top-1, top-5 (where there are more than five classes) and mean per class, each with its chance level.

    Args:
        ranks: (N,) the rank of the true class among all classes.
        labels: (N,) the true class.
        classes: C.
    """
    metrics = {
        "top1": recall(ranks, 1),
        "mean_per_class": per_class(ranks, labels, classes).nanmean().item(),
        "chance_top1": 1 / classes,
        "chance_mean_per_class": 1 / classes,
    }
    if classes > 5:
        metrics |= {"top5": recall(ranks, 5), "chance_top5": 5 / classes}
    return metrics


def per_class(ranks: Tensor, labels: Tensor, classes: int) -> Tensor:
    """(C,) float64: share of each class's images that are right; NaN for a class without images."""
    right = torch.zeros(classes, dtype=torch.float64).scatter_add_(0, labels, (ranks == 1).double())
    return right / torch.bincount(labels, minlength=classes)


def class_details(predicted: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """For the report: every class with its images and accuracy, and who was taken for whom.

    Args:
        predicted: (N,) the class each image was taken for.
        labels: (N,) the true class.
        names: of the C classes.

    Returns:
        classes: [{name, images, top1}], top1 None for a class without images.
        confusion: [C][C] counts, rows true, where there are at most `MOST_CLASSES_IN_CONFUSION` classes.
    """
    right = torch.where(predicted == labels, 1, 2)
    accuracies = per_class(right, labels, len(names)).tolist()
    counts = torch.bincount(labels, minlength=len(names)).tolist()
    details: dict[str, Any] = {
        "classes": [
            {"name": name, "images": count, "top1": accuracy if count else None}
            for name, count, accuracy in zip(names, counts, accuracies, strict=True)
        ]
    }
    if len(names) <= MOST_CLASSES_IN_CONFUSION:
        confusion = torch.bincount(labels * len(names) + predicted, minlength=len(names) ** 2)
        details["confusion"] = confusion.view(len(names), len(names)).tolist()
    return details
