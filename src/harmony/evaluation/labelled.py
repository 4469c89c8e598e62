"""Labelled features to learn from and to measure on: what knn and linear begin with, and what they refuse.

Shapes: n labelled examples, b of one block, W width of a feature.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from harmony import ranks
from harmony.data.sources import Source
from harmony.errors import UserError
from harmony.evaluation.classification import require_named
from harmony.evaluation.features import ImageFeatures
from harmony.evaluation.progress import say
from harmony.evaluation.store import Shard
from harmony.evaluation.task import Setup, measured_on_itself

Representation = Literal["cls", "embedding", "cls_patches"]
"""What stands for an image: the last block's class token, the embedding in the space shared with texts, or the class
token beside the mean of the last block's patch tokens."""


@dataclass(frozen=True)
class Labelled:
    """The labelled images of a source, encoded.

    Attributes:
        images: all that were encoded, without label too.
        labels: (n,) int64, the classes of those that have one.
        unlabelled: how many have none.
    """

    images: ImageFeatures
    labels: Tensor
    unlabelled: int

    def __len__(self) -> int:
        return len(self.labels)

    def blocks(self, representation: Representation, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(b, W) float32 features of unit length and (b,) labels, at most `size` at a time, in the source's order."""
        for shard in self.images.shards:
            rows = (shard["labels"] >= 0).nonzero().flatten()
            for some in rows.split(size):
                yield _vectors(shard, some, representation), shard["labels"][some]

    def vectors(self, representation: Representation) -> Tensor:
        """(n, W) float32 features of unit length."""
        return torch.cat([block for block, _ in self.blocks(representation, 16_384)])


def _vectors(shard: Shard, rows: Tensor, representation: Representation) -> Tensor:
    if representation == "embedding":
        return shard["embeddings"][rows]
    cls = F.normalize(shard["cls"][:, -1][rows], dim=1)
    if representation == "cls":
        return cls
    return F.normalize(torch.cat([cls, F.normalize(shard["patches"][rows], dim=1)], dim=1), dim=1)


def missing_pair(setup: Setup, task: str) -> str | None:
    """Why a classifier cannot be learned and measured with these data, as far as can be seen without encoding them."""
    data, train = setup.data, setup.train
    if train is None:
        return f"{task} learns from labelled data; name them with --train-data (evaluation.train in a recipe)"
    for source in (data, train):
        if not source.has_labels():
            return f"{task} needs labels, and {source.uri} has none; give it data with classes"
    return measured_on_itself(train, data, task) or _other_classes(train, data)


def _other_classes(train: Source, data: Source) -> str | None:
    learned, measured = train.class_names, data.class_names
    if learned == measured:
        return None
    same = "; both need the same classes in the same order"
    if not learned or not measured:
        named, nameless = (train, data) if learned else (data, train)
        return f"{named.uri} has class names and {nameless.uri} has none" + same
    if len(learned) != len(measured):
        return f"{train.uri} has {len(learned)} classes and {data.uri} has {len(measured)}" + same
    i = next(i for i, (a, b) in enumerate(zip(learned, measured, strict=True)) if a != b)
    return f"class {i} is {learned[i]!r} in {train.uri} and {measured[i]!r} in {data.uri}" + same


def labelled(setup: Setup, source: Source) -> Labelled:
    """The labelled part of a source.

    Raises:
        UserError: no example has a label, or one has a label without a name.
    """
    images = setup.features(source).images()
    labels = images.labels[images.labels >= 0]
    if not len(labels):
        raise UserError(f"no example of {source.uri} has a label; give it labelled data")
    names = source.class_names
    if names is not None:
        require_named(int(labels.max()), names, source.uri)
    return Labelled(images, labels, len(images) - len(labels))


def labelled_pair(setup: Setup) -> tuple[Labelled, Labelled, list[str]]:
    """What is learned from, what is measured on, and the names of the C classes (their numbers, where none are known).

    Raises:
        UserError: as `labelled`, or all training images are of one class.
    """
    assert setup.train is not None
    train, data = labelled(setup, setup.train), labelled(setup, setup.data)
    if len(train.labels.unique()) < 2:
        raise UserError(f"all labelled images of {setup.train.uri} are of one class; learning needs two or more")
    _tell_seen(train, data, setup)
    classes = 1 + max(int(train.labels.max()), int(data.labels.max()))
    return train, data, list(setup.data.class_names or map(str, range(classes)))


def _tell_seen(train: Labelled, data: Labelled, setup: Setup) -> None:
    """Say how many images look to the encoder exactly like one that is learned from: copies, in all likelihood."""
    seen = also_in_training(train, data)
    if seen and ranks.is_main():
        assert setup.train is not None
        say(
            f"{seen:,} of the {len(data):,} images of {setup.data.uri} have the very features of an image of "
            f"{setup.train.uri}: where these are the same images, the numbers flatter"
        )


def also_in_training(train: Labelled, data: Labelled) -> int:
    """How many of the images have the features, to a thousandth, of one that is learned from."""
    known = torch.cat([_hashed(block) for block, _ in train.blocks("embedding", 16_384)])
    own = torch.cat([_hashed(block) for block, _ in data.blocks("embedding", 16_384)])
    return int(torch.isin(own, known).sum())


def _hashed(features: Tensor) -> Tensor:
    """(b, W) -> (b,) int64, equal where rounded rows are: last bits change with the batch an image was in."""
    odd = torch.arange(features.shape[1]) * 0x9E3779B97F4A7C1 + 0x632BE59BD9B4E01
    return ((features * 1000).round().long() * odd).sum(1)


def counts(train: Labelled, data: Labelled) -> dict[str, int]:
    """How many examples were used and left out, for the metrics."""
    return {
        "examples": len(data),
        "unlabelled": data.unlabelled,
        "bad_examples": len(data.images.bad),
        "train_examples": len(train),
        "train_unlabelled": train.unlabelled,
        "train_bad_examples": len(train.images.bad),
    }
