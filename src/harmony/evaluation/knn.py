"""knn: the class that the nearest training images vote for (Wu et al., arXiv 1805.01978, section 3.4).

As DINO measures it (arXiv 2104.14294, section 4.1): features of unit length, cosine similarity, and each of the k
nearest training images votes for its class with weight exp(similarity / 0.07). Nothing is trained.

The training features pass by in blocks, and each image keeps its nearest so far, so memory does not grow with their
number. Shapes: Q images measured on, b training images of a block, n nearest kept, C classes, W width of a feature.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from harmony import ranks
from harmony.data.sources import Source
from harmony.errors import UserError
from harmony.evaluation.classification import accuracy, class_details, ranks_of, taken_for
from harmony.evaluation.labelled import Labelled, counts, labelled_pair, missing_pair
from harmony.evaluation.progress import say, track
from harmony.evaluation.ranking import TIE
from harmony.evaluation.results import Outcome
from harmony.evaluation.settings import KnnConfig
from harmony.evaluation.task import Card, Setup
from harmony.training.distributed import everyones, together

QUERIES = 1024
"""Images compared with a block at a time: with 4096 training images they take some 60 MiB."""

STEP = 2.0**-49
"""What an image's similarity loses for each place in the training data: far below the rounding of a similarity in
float32, and enough to give ties an order."""


def missing(setup: Setup) -> str | None:
    """Why neighbours cannot vote on this data; None when they can."""
    return missing_pair(setup, "knn")


def card(setup: Setup) -> Card:
    """The protocol."""
    config = setup.config.knn
    train = setup.shown(setup.train) if setup.train else "none"
    what = {
        "cls": "the last block's class token",
        "embedding": "the embedding in the space shared with texts",
        "cls_patches": "the last block's class token beside the mean of its patch tokens, each of unit length",
    }[config.representation]
    return Card(
        resolution=f"{setup.size} px, the central square of the image",
        split=f"neighbours from every labelled example of {train}; measured on every labelled example of "
        f"{setup.shown(setup.data)}",
        selection=f"none: k = {', '.join(map(str, config.ks))} are all reported (as many neighbours as "
        f"there are), and {config.k} was named beforehand",
        optimiser="none; nothing is trained",
        schedule=f"{what}, cosine similarity, votes exp(similarity / {config.temperature:g})",
        differs="as Wu et al. (arXiv 1805.01978) and DINO (arXiv 2104.14294), which report the best k on the test set; "
        "classes that get equal votes count as wrong",
    )


def run(setup: Setup) -> Outcome:
    """Measure.

    Raises:
        UserError: a label has no name, no example has one, all training images are of one class, or there are fewer
            of them than neighbours wanted.
    """
    config = setup.config.knn
    assert setup.train is not None
    if len(setup.train) < min(config.ks):  # before anything is encoded
        raise _too_few(config, len(setup.train), setup.train)
    train, data, names = labelled_pair(setup)
    ks = _ks_that_fit(config, len(train), setup)
    headline = max(k for k in ks if k <= config.k)
    with together():
        mine = slice(ranks.rank(), None, ranks.count())
        queries, labels = data.vectors(config.representation)[mine], data.labels[mine]
        similarity, voters = nearest(queries, _blocks(train, config), max(ks), setup.encoder.device)
        found = {k: judged(similarity, voters, labels, k, len(names), config.temperature) for k in ks}
    whole = {k: _in_order([one[k] for one in everyones(found)]) for k in ks}
    metrics: dict[str, float] = accuracy(whole[headline][0], data.labels, len(names)) | {"k": headline}
    for k in ks:
        at_k = accuracy(whole[k][0], data.labels, len(names))
        metrics |= {f"{name}@{k}": value for name, value in at_k.items()}
    return Outcome(metrics | counts(train, data), class_details(whole[headline][1], data.labels, names))


def _ks_that_fit(config: KnnConfig, images: int, setup: Setup) -> list[int]:
    ks = [k for k in config.ks if k <= images]
    assert setup.train is not None
    if not ks:
        raise _too_few(config, images, setup.train)
    if len(ks) < len(config.ks) and ranks.is_main():
        left_out = ", ".join(str(k) for k in config.ks if k > images)
        say(f"{setup.train.uri} has only {images} labelled images; left out: k = {left_out}")
    return ks


def _too_few(config: KnnConfig, images: int, train: Source) -> UserError:
    return UserError(
        f"knn wants {min(config.ks)} neighbours or more, and {train.uri} has {images} labelled images; lower ks (and k)"
    )


def _blocks(train: Labelled, config: KnnConfig) -> Iterable[tuple[Tensor, Tensor]]:
    blocks = train.blocks(config.representation, config.block)
    if not ranks.is_main():
        return blocks
    count = sum(-(-int((shard["labels"] >= 0).sum()) // config.block) for shard in train.images.shards)
    return track(blocks, count, f"comparing with {len(train):,} images")


@torch.no_grad()
def nearest(
    queries: Tensor, blocks: Iterable[tuple[Tensor, Tensor]], most: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """The nearest training images of each image, the most similar first; of equal ones, the first in the data.

    Args:
        queries: (Q, W), of unit length.
        blocks: training features (b, W), of unit length, and their labels (b,).
        most: n; there are at least so many training images.
        device: where similarities are computed.

    Returns:
        (Q, n) float64 similarities and (Q, n) int64 labels, on the CPU.
    """
    queries = queries.to(device)
    keys = torch.full((len(queries), most), float("-inf"), dtype=torch.float64, device=device)
    voters = torch.zeros(len(queries), most, dtype=torch.int64, device=device)
    start = 0
    for features, labels in blocks:
        features, labels = features.to(device), labels.to(device)
        for rows in _rows(len(queries)):
            similarity = queries[rows] @ features.T
            found, which = _candidates(similarity, keys[rows, -1:], start)
            keys[rows], order = torch.cat([keys[rows], found], dim=1).topk(most, dim=1)
            voters[rows] = torch.cat([voters[rows], labels[which]], dim=1).gather(1, order)
        start += len(features)
    return keys.cpu(), voters.cpu()


def _candidates(similarity: Tensor, worst: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """The training images of a block that may be among the nearest: (Q, m) keys, and (Q, m) their places in the block.

    Keys are similarities, less `STEP` for each place in the data: no two are equal, so the nearest do not depend on how
    the data are cut into blocks. After a few blocks hardly any image passes, and m is small.

    Args:
        similarity: (Q, b) float32.
        worst: (Q, 1), the smallest key of the nearest so far.
        start: place of the block in the training data.
    """
    queries, size = similarity.shape
    if not worst.isfinite().all():
        columns = torch.arange(size, device=similarity.device)
        return similarity.double().sub_((columns + start).double() * STEP), columns.expand(queries, -1)
    # A key rounds to the similarity it was made from, or below it, so that what could still be nearer passes.
    row, column = (similarity >= worst.float()).nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=queries)
    slot = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    shape = (queries, int(counts.max()))
    keys = torch.full(shape, float("-inf"), dtype=torch.float64, device=row.device)
    columns = torch.zeros(shape, dtype=torch.int64, device=row.device)
    keys[row, slot] = similarity[row, column].double() - (column + start).double() * STEP
    columns[row, slot] = column
    return keys, columns


def judged(
    similarity: Tensor, voters: Tensor, labels: Tensor, k: int, classes: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """What the first k neighbours say.

    Args:
        similarity: (Q, n >= k), falling.
        voters: (Q, n) the neighbours' classes.
        labels: (Q,) the true classes.
        k: how many neighbours vote.
        classes: C.
        temperature: of the votes.

    Returns:
        (Q,) the rank of the true class by its votes, with classes before it whose votes are equal as far as rounding of
        the similarities allows to say, and (Q,) the class each image is taken for.
    """
    true_ranks, predicted = torch.empty_like(labels), torch.empty_like(labels)
    for rows in _rows(len(labels)):
        near, label = similarity[rows, :k], labels[rows]
        weights = ((near - near[:, :1]) / temperature).exp()  # the nearest weighs 1: no overflow, the same order
        votes = torch.zeros(len(near), classes, dtype=weights.dtype).scatter_add_(1, voters[rows, :k], weights)
        own = votes.gather(1, label[:, None]) * math.exp(-TIE / temperature)  # what is left of it at worst
        true_ranks[rows] = ranks_of(votes.scatter(1, label[:, None], own), label)
        predicted[rows] = taken_for(votes, label, true_ranks[rows])
    return true_ranks, predicted


def _rows(count: int) -> Iterator[slice]:
    return (slice(start, start + QUERIES) for start in range(0, count, QUERIES))


def _in_order(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Ranks and classes of all images, from what each of r processes found for every r-th."""
    whole = tuple(torch.empty(sum(len(part[i]) for part in parts), dtype=torch.int64) for i in range(2))
    for place, part in enumerate(parts):
        for tensor, found in zip(whole, part, strict=True):
            tensor[place :: len(parts)] = found
    return whole[0], whole[1]
