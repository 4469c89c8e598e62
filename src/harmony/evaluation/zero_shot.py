"""Zero-shot classification: the class whose name, read by the text tower, is most similar to the image (CLIP, 3.1).

Every class name is put in every prompt template; the prompts' embeddings are brought to unit length, averaged, and
brought to unit length again, as CLIP does (arXiv 2103.00020, section 3.1.4).

Shapes: N images, C classes, E shared width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from harmony.errors import UserError
from harmony.evaluation.features import Features
from harmony.evaluation.ranking import best_ranks, recall
from harmony.evaluation.results import Outcome
from harmony.evaluation.task import Card, Setup
from harmony.evaluation.templates import load_templates, prompts

MOST_CLASSES_IN_CONFUSION = 100
"""Larger confusion matrices are not kept: nobody can read them."""


def missing(setup: Setup) -> str | None:
    """Why this data or encoder has no zero-shot classification; None when it has."""
    if not setup.encoder.reads_text:
        return "zero_shot needs a text tower, and this model was trained on images alone"
    if not setup.data.class_names:
        return f"zero_shot needs class names, and {setup.data.uri} has none; give it labelled data or use retrieval"
    return None


def card(setup: Setup) -> Card:
    """The protocol."""
    templates = load_templates(setup.config.zero_shot.templates)
    return Card(
        resolution=f"{setup.size} px, the central square of the image",
        split=f"nothing is learned; measured on every labelled example of {setup.data.uri}",
        selection="none",
        optimiser="none",
        schedule=f"{len(templates)} prompt templates a class ({setup.config.zero_shot.templates}), embeddings averaged",
        differs="as CLIP (arXiv 2103.00020, 3.1.4); ties count as wrong, so that a collapsed encoder scores nothing",
    )


def run(setup: Setup) -> Outcome:
    """Measure.

    Raises:
        UserError: the class names repeat, do not fit the labels, or no example has a label.
    """
    features = setup.features(setup.data)
    names = list(setup.data.class_names or [])
    _check_names(names)
    templates = load_templates(setup.config.zero_shot.templates)
    images = features.images()
    labelled = images.labels >= 0
    labels = images.labels[labelled]
    _check_labels(labels, names, setup.data.uri)
    classes = class_embeddings(features, names, templates)
    embeddings = images.embeddings[labelled]
    ranks = best_ranks(embeddings, classes, (torch.arange(len(labels)), labels), device=features.encoder.device)
    metrics = accuracy(ranks, labels, len(names))
    metrics |= {"examples": len(labels), "unlabelled": int((~labelled).sum()), "bad_examples": len(images.bad)}
    return Outcome(metrics, _details(embeddings, classes, ranks, labels, names, templates))


def class_embeddings(features: Features, names: Sequence[str], templates: tuple[str, ...]) -> Tensor:
    """(C, E), one embedding of unit length a class."""
    sentences = [sentence for name in names for sentence in prompts(name, templates)]
    each = features.texts(sentences).unflatten(0, (len(names), len(templates)))
    return F.normalize(each.mean(dim=1), dim=-1)


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


def _check_names(names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"the class name {twice[0]!r} stands for several classes; zero_shot needs different names")


def _check_labels(labels: Tensor, names: list[str], uri: str) -> None:
    if not len(labels):
        raise UserError(f"no example of {uri} has a label; zero_shot needs labelled data")
    if int(labels.max()) >= len(names):
        raise UserError(
            f"{uri} has the label {int(labels.max())} but only {len(names)} class names (labels count from 0); "
            "give it one name a class"
        )


def _details(
    embeddings: Tensor, classes: Tensor, ranks: Tensor, labels: Tensor, names: list[str], templates: tuple[str, ...]
) -> dict[str, object]:
    accuracies = per_class(ranks, labels, len(names)).tolist()
    details: dict[str, object] = {
        "classes": [
            {"name": name, "images": count, "top1": accuracy if count else None}
            for name, count, accuracy in zip(
                names, torch.bincount(labels, minlength=len(names)).tolist(), accuracies, strict=True
            )
        ],
        "templates": list(templates),
    }
    if len(names) <= MOST_CLASSES_IN_CONFUSION:
        predicted = (embeddings @ classes.T).argmax(dim=1)
        confusion = torch.bincount(labels * len(names) + predicted, minlength=len(names) ** 2)
        details["confusion"] = confusion.view(len(names), len(names)).tolist()
    return details
