"""What the linear probe learns from and is measured on: labelled features, the held-out split, a probe's inputs.

Shapes: N labelled images, L last blocks, D width of a token, C classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from harmony.data.sources import Source
from harmony.errors import UserError
from harmony.evaluation.features import ImageFeatures
from harmony.evaluation.seeds import seeded
from harmony.evaluation.task import Setup


@dataclass(frozen=True)
class Labelled:
    """The labelled examples of a source, encoded.

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
    def of(cls, images: ImageFeatures) -> "Labelled":
        kept = images.labels >= 0
        unlabelled = int((~kept).sum())
        if not unlabelled:  # spares a copy of everything
            return cls(images.cls, images.patches, images.labels, images.indices, 0, len(images.bad))
        own = (images.cls[kept], images.patches[kept], images.labels[kept], images.indices[kept])
        return cls(*own, unlabelled, len(images.bad))


def why_not(setup: Setup) -> str | None:
    """Why nothing can be learned from these sources, as far as their indices show; None when it can."""
    if setup.train is None:
        return "linear learns from labelled data; name it with --train-data (evaluation.train in a recipe)"
    for source in (setup.train, setup.data):
        if not source.has_labels():
            return f"linear needs labelled data, and {source.uri} has no labels; give it data with classes"
    train, test = setup.train.class_names, setup.data.class_names
    if train is not None and test is not None and list(train) != list(test):
        return (
            f"{setup.train.uri} and {setup.data.uri} have different classes ({_difference(train, test)}); "
            "train and test data need the same class names in the same order"
        )
    return None


def _difference(train: list[str], test: list[str]) -> str:
    place = next((i for i, (a, b) in enumerate(zip(train, test, strict=False)) if a != b), None)
    if place is None:
        return f"{len(train)} and {len(test)}"
    return f"class {place} is {train[place]!r} in one, {test[place]!r} in the other"


def train_and_test(setup: Setup) -> tuple[Labelled, Labelled, list[str]]:
    """Both sources, encoded, and the names of the C classes.

    Raises:
        UserError: there is no label, a label without a name, or a single class to learn from.
    """
    assert setup.train is not None
    train, test = (Labelled.of(setup.features(source).images()) for source in (setup.train, setup.data))
    for part, source in ((train, setup.train), (test, setup.data)):
        if not len(part):
            raise UserError(f"no example of {source.uri} has a label; linear needs labelled data")
    names = setup.train.class_names or setup.data.class_names
    if names is None:
        names = [str(i) for i in range(1 + int(torch.cat([train.labels, test.labels]).max()))]
    for part, source in ((train, setup.train), (test, setup.data)):
        _check_labels(part.labels, names, source)
    seen = train.labels.unique()
    if len(seen) == 1:
        raise UserError(
            f"all labelled examples of {setup.train.uri} are of one class ({names[int(seen[0])]}); "
            "linear needs two or more to learn from"
        )
    return train, test, list(names)


def _check_labels(labels: Tensor, names: list[str], source: Source) -> None:
    if int(labels.max()) >= len(names):
        raise UserError(
            f"{source.uri} has the label {int(labels.max())} but only {len(names)} class names (labels count from 0); "
            "give it one name a class"
        )


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

    def of(self, cls: Tensor, patches: Tensor) -> Tensor:
        """(N, L, D) class tokens and (N, D) mean patches -> (N, layers * D), or (N, (layers + 1) * D)."""
        tokens = cls[:, -self.layers :].flatten(1)
        return tokens if self.pooling == "cls" else torch.cat([tokens, patches], dim=1)
