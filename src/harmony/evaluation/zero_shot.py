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
from harmony.evaluation.class_names import names_for
from harmony.evaluation.classification import accuracy, class_details, require_named, taken_for
from harmony.evaluation.features import Features
from harmony.evaluation.ranking import best_ranks
from harmony.evaluation.results import Outcome
from harmony.evaluation.task import Card, Setup
from harmony.evaluation.templates import load_templates, prompts

ROWS = 16384
"""Images that are compared with the classes at a time."""


def missing(setup: Setup) -> str | None:
    """Why this data or encoder has no zero-shot classification; None when it has."""
    if not setup.encoder.reads_text:
        return "zero_shot needs a text tower, and this model was trained on images alone"
    if not setup.data.has_labels():
        return f"zero_shot needs labels, and {setup.data.uri} has none; give it labelled data or use retrieval"
    names = names_for(setup.data, setup.config.zero_shot.classes)
    if len(names) == 1:
        return (
            f"{setup.data.uri} has one class, {names[0]!r}, and nothing to confuse it with; zero_shot needs two or more"
        )
    if not names:
        return (
            f"zero_shot needs class names, and {setup.data.uri} has none; name them with --set classes=FILE "
            "(or imagenet), or use retrieval"
        )
    return None


def card(setup: Setup) -> Card:
    """The protocol."""
    templates, classes = load_templates(setup.config.zero_shot.templates), setup.config.zero_shot.classes
    return Card(
        resolution=f"{setup.size} px, the central square of the image",
        split=f"nothing is learned; measured on every labelled example of {setup.shown(setup.data)}"
        + (f", its classes named by {classes}" if classes else ""),
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
    names = names_for(setup.data, setup.config.zero_shot.classes)
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
    # In parts: a million images have a billion similarities to a thousand classes.
    parts = [part.split(ROWS) for part in (embeddings, labels, ranks)]
    predicted = torch.cat([taken_for(some @ classes.T, own, rank) for some, own, rank in zip(*parts, strict=True)])
    return Outcome(metrics, class_details(predicted, labels, names) | {"templates": list(templates)})


def class_embeddings(features: Features, names: Sequence[str], templates: tuple[str, ...]) -> Tensor:
    """(C, E), one embedding of unit length a class."""
    sentences = [sentence for name in names for sentence in prompts(name, templates)]
    each = features.texts(sentences).unflatten(0, (len(names), len(templates)))
    return F.normalize(each.mean(dim=1), dim=-1)


def _check_names(names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"the class name {twice[0]!r} stands for several classes; zero_shot needs different names")


def _check_labels(labels: Tensor, names: list[str], uri: str) -> None:
    if not len(labels):
        raise UserError(f"no example of {uri} has a label; zero_shot needs labelled data")
    require_named(int(labels.max()), names, uri)
