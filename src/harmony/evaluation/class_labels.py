"""Labels of training and test data for tasks that train, read and checked before anything is trained.

Shapes: N images, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from harmony import ranks
from harmony.data.decode import decode
from harmony.data.sources import BadExample, Source
from harmony.data.workers import count_workers, start_worker
from harmony.errors import UserError
from harmony.evaluation.classification import require_named
from harmony.evaluation.progress import BAD_SHOWN, say, say_left_out, track
from harmony.evaluation.seeds import generator
from harmony.evaluation.settings import EvaluationConfig
from harmony.training.distributed import everyones

_CHUNK = 64
"""Examples a worker reads at a time."""


@dataclass(frozen=True)
class Labels:
    """The labelled examples of a source that can be read.

    Attributes:
        positions: (N,) int64, where they stand in the source.
        labels: (N,) int64.
        unlabelled: how many have no label.
        bad: (key, reason) of those that cannot be read.
    """

    positions: Tensor
    labels: Tensor
    unlabelled: int
    bad: list[tuple[str, str]]


def read_labels(
    source: Source, positions: Sequence[int], names: Sequence[str], config: EvaluationConfig, max_pixels: int | None
) -> Labels:
    """Read the labels of some examples; under torchrun each process reads its share.

    Args:
        source: the examples.
        positions: which of them.
        names: of the C classes.
        config: how many processes read.
        max_pixels: decode each image too, to find those that are damaged or larger than this; None looks at labels
            alone.

    Raises:
        UserError: no example has a label, or a label is not among the classes.
    """
    own = _Reader(source, positions[ranks.rank() :: ranks.count()], max_pixels)
    workers = count_workers(config.workers, 2**20)
    loader: DataLoader[list[tuple[int, int, str]]] = DataLoader(
        own,
        batch_size=None,
        num_workers=max(0, min(workers, len(own) - 1)),
        worker_init_fn=start_worker,
        generator=torch.Generator(),
    )
    what = "labels" if max_pixels is None else "images and labels"
    found = [one for chunk in track(loader, len(own), f"reading {len(positions):,} {what}") for one in chunk]
    every = sorted(one for part in everyones(found) for one in part)
    good = [(place, label) for place, label, reason in every if not reason and label >= 0]
    bad = [(source.key(place), reason) for place, _, reason in every if reason]
    _check(source, [label for _, label in good], names, bad)
    places, labels = torch.tensor(good, dtype=torch.int64).T.contiguous()
    return Labels(places, labels, len(every) - len(good) - len(bad), bad)


def share_of(labels: Labels, share: float, seed: int) -> Labels:
    """A part of the examples: the same share of every class, rounded, and at least one.

    Each class is shuffled by the seed and its first examples are taken, so that a smaller share is part of a larger
    one. The order is that of the source.
    """
    if share == 1:
        return labels
    taken = []
    for label in labels.labels.unique().tolist():
        places = (labels.labels == label).nonzero().flatten()
        order = torch.randperm(len(places), generator=generator("share of labels", seed, label))
        taken.append(places[order[: max(1, round(share * len(places)))]])
    chosen = torch.cat(taken).sort().values
    return Labels(labels.positions[chosen], labels.labels[chosen], labels.unlabelled, labels.bad)


def training_labels(
    source: Source, names: Sequence[str], share: float, seed: int, config: EvaluationConfig, max_pixels: int
) -> Labels:
    """The images that a classifier learns from: labelled, readable, of a share of the labels.

    The share is drawn before images are decoded, so that only those that are learned from are.

    Raises:
        UserError: no example has a label, they are all of one class, or a label is not among the classes.
    """
    everything = range(len(source))
    if share == 1:
        labels = read_labels(source, everything, names, config, max_pixels)
    else:
        drawn = share_of(read_labels(source, everything, names, config, None), share, seed)
        checked = read_labels(source, drawn.positions.tolist(), names, config, max_pixels)
        labels = Labels(checked.positions, checked.labels, drawn.unlabelled, drawn.bad + checked.bad)
    counts = torch.bincount(labels.labels, minlength=len(names))
    if (counts > 0).sum() < 2:
        only = names[int(counts.argmax())]
        raise UserError(f"all labelled examples of {source.uri} are {only!r}; a classifier needs at least two classes")
    if ranks.is_main():
        _tell(source, labels, counts.tolist(), names)
    return labels


def _tell(source: Source, labels: Labels, counts: Sequence[int], names: Sequence[str]) -> None:
    without = [name for name, count in zip(names, counts, strict=True) if not count]
    say(f"Learning from {len(labels.labels):,} of {len(source):,} images, {min(counts)} to {max(counts)} a class")
    if without:
        shown = ", ".join(without[:BAD_SHOWN]) + (", ..." if len(without) > BAD_SHOWN else "")
        say(f"{len(without)} classes have no training image and are never predicted rightly: {shown}")
    say_left_out(source.uri, labels.bad)


def _check(source: Source, labels: Sequence[int], names: Sequence[str], bad: Sequence[tuple[str, str]]) -> None:
    if not labels:
        why = f"; {len(bad):,} cannot be read ({bad[0][0]} {bad[0][1]})" if bad else ""
        raise UserError(f"no example of {source.uri} has a label{why}; give it labelled data")
    require_named(max(labels), names, source.uri)


class _Reader(Dataset[list[tuple[int, int, str]]]):
    """Chunks of (position, label or -1, why it cannot be read or "")."""

    def __init__(self, source: Source, positions: Sequence[int], max_pixels: int | None) -> None:
        self._source, self._positions, self._max_pixels = source, positions, max_pixels

    def __len__(self) -> int:
        return -(-len(self._positions) // _CHUNK)

    def __getitem__(self, chunk: int) -> list[tuple[int, int, str]]:
        return [self._read(place) for place in self._positions[chunk * _CHUNK : (chunk + 1) * _CHUNK]]

    def _read(self, place: int) -> tuple[int, int, str]:
        try:
            example = self._source[place]
            if self._max_pixels is not None and example.label is not None:
                decode(example.image, self._max_pixels, example.key)
        except BadExample as bad:
            return place, -1, bad.reason
        return place, -1 if example.label is None else example.label, ""
