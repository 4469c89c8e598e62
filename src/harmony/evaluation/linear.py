"""linear: a linear classifier on frozen features.

Which layers, which pooling and which regularisation (or learning rate) is chosen on a part of the training set that is
held out; the test set is looked at once, when everything is chosen.

Shapes: N images, D width of a probe's inputs, C classes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harmony import ranks
from harmony.errors import UserError
from harmony.evaluation.classification import accuracy, class_details, ranks_of, taken_for
from harmony.evaluation.features import LAYERS
from harmony.evaluation.labelled import missing_pair
from harmony.evaluation.linear_data import Inputs, Probed, split, train_and_test
from harmony.evaluation.linear_sgd import MOMENTUM, train_heads
from harmony.evaluation.logistic import Classifier, Problem
from harmony.evaluation.progress import track
from harmony.evaluation.results import Outcome
from harmony.evaluation.task import Card, Setup
from harmony.evaluation.weights_file import save_weights


def missing(setup: Setup) -> str | None:
    """Why this data or encoder cannot be measured so; None when it can."""
    return missing_pair(setup, "linear")


def card(setup: Setup) -> Card:
    """The protocol."""
    config = setup.config.linear
    learned_from = "the training data" if setup.train is None else setup.shown(setup.train)
    heads = len(inputs_tried(setup))
    share = f"{100 * config.validation_share:g} % of each class of the training set, held out (seed {config.seed})"
    split = f"learned from every labelled example of {learned_from}, "
    split += f"measured once on every labelled example of {setup.shown(setup.data)}"
    chosen_by = "by top-1 accuracy (loss among equals), over layers, pooling and"
    if config.mode == "lbfgs":
        return Card(
            resolution=f"{setup.size} px, the central square of the image",
            split=split,
            selection=f"on {share}, {chosen_by} regularisation ({heads} x {len(config.regularisation)} settings), then "
            "fitted again on all",
            optimiser="L-BFGS with strong-Wolfe line search, on logistic regression with squared weights penalised",
            schedule="until the gradient vanishes, 500 iterations at most; no augmentation",
            differs="as CLIP (arXiv 2103.00020, A.3) in the solver; features are standardised by training statistics, "
            "and layers and pooling are in the grid, as in DINOv2 (arXiv 2304.07193, B.3)",
        )
    length = f"{config.steps:,} steps" if config.steps else f"{config.epochs:g} epochs"
    return Card(
        resolution=f"{setup.size} px; random crops of {config.smallest_crop:g} to 1 of the area and flips to learn "
        "from, the central square to choose and to measure",
        split=split,
        selection=f"on {share}, {chosen_by} learning rate ({heads} x {len(config.lr_factors)} heads trained side by "
        "side); not fitted again",
        optimiser=f"SGD, momentum {MOMENTUM}, weight decay {config.weight_decay:g}, batch {config.train_batch_size}, "
        f"learning rates {config.lr:g} x {', '.join(f'{factor:g}' for factor in config.lr_factors)}",
        schedule=f"{length}, warmup {config.warmup}, then cosine to {config.final_lr:g}",
        differs="as DINOv2 (arXiv 2304.07193, B.3), but chosen on held-out training images, not on the test set, and "
        "on features standardised by training statistics; DINO trains 100 epochs (arXiv 2104.14294), MAE 90 with LARS",
    )


def run(setup: Setup) -> Outcome:
    """Measure.

    Raises:
        UserError: the labels do not fit, all training images are of one class, or there is nothing to choose on.
    """
    train, test, names = train_and_test(setup)
    grid, chosen, classifier = _learned(setup, train, len(names))
    scores = classifier.scores(chosen.inputs.of(test.cls, test.patches).to(setup.encoder.device)).cpu()
    true_ranks = ranks_of(scores, test.labels)
    metrics = accuracy(true_ranks, test.labels, len(names))
    if chosen.validation_top1 is not None:
        metrics["validation_top1"] = chosen.validation_top1
    metrics |= {"examples": len(test), "unlabelled": test.unlabelled, "bad_examples": test.bad}
    metrics |= {"train_examples": len(train), "train_unlabelled": train.unlabelled, "train_bad_examples": train.bad}
    if setup.work is not None:
        weight, bias = classifier.raw()  # for features as the encoder gives them
        about = {"layers": str(chosen.inputs.layers), "pooling": chosen.inputs.pooling}
        save_weights(setup.work / "classifier.safetensors", {"weight": weight, "bias": bias}, about)
    details = class_details(taken_for(scores, test.labels, true_ranks), test.labels, names)
    name = "regularisation" if setup.config.linear.mode == "lbfgs" else "lr"
    details["grid"] = [one.row(name) | {"chosen": one == chosen} for one in grid]
    if setup.config.linear.mode == "lbfgs":
        details |= {"iterations": classifier.steps, "gradient": classifier.gradient}
    return Outcome(metrics, details)


@dataclass(frozen=True)
class Tried:
    """A setting of the grid, and how it did on the images held out; None where there was nothing to choose.

    Attributes:
        inputs: layers and pooling.
        value: regularisation, or learning rate.
        validation_top1, validation_loss: accuracy and mean cross-entropy.
    """

    inputs: Inputs
    value: float
    validation_top1: float | None = None
    validation_loss: float | None = None

    def row(self, name: str) -> dict[str, Any]:
        return {
            "layers": self.inputs.layers,
            "pooling": self.inputs.pooling,
            name: self.value,
            "validation_top1": self.validation_top1,
            "validation_loss": self.validation_loss,
        }


def inputs_tried(setup: Setup) -> list[Inputs]:
    """Layers and pooling of the grid; of layers no more than the encoder has."""
    config, most = setup.config.linear, min(LAYERS, setup.encoder.depth)
    kinds = [Inputs(min(layers, most), pooling) for layers in config.layers for pooling in config.pooling]
    return list(dict.fromkeys(kinds))


def best(grid: Sequence[Tried]) -> Tried:
    """The one with the highest accuracy; among equals with the lowest loss, then the first."""
    return max(grid, key=lambda one: (one.validation_top1 or 0.0, -(one.validation_loss or 0.0)))


def _learned(setup: Setup, train: Probed, classes: int) -> tuple[list[Tried], Tried, Classifier]:
    """Every setting, the chosen one, and its classifier."""
    config, kinds = setup.config.linear, inputs_tried(setup)
    lbfgs = config.mode == "lbfgs"
    # From strong regularisation to weak: each solution is near the one before.
    values = sorted(config.regularisation, reverse=True) if lbfgs else [config.lr * f for f in config.lr_factors]
    grid = [Tried(kind, value) for kind in kinds for value in values]
    everything = torch.arange(len(train))
    fitted, held_out = (everything, everything[:0]) if len(grid) == 1 else _split(setup, train)
    if lbfgs:
        if len(grid) > 1:
            grid = search(grid, train, fitted, held_out, classes, setup.encoder.device)
        chosen = best(grid)
        whole = chosen.inputs.of(train.cls, train.patches).to(setup.encoder.device)
        return grid, chosen, Problem(whole, train.labels, classes).solve(chosen.value)
    heads = train_heads(setup, train, fitted, kinds, classes)
    classifiers = [heads.classifier(place) for place in range(len(grid))]
    if len(grid) > 1:
        pairs = groupby(zip(grid, classifiers, strict=True), lambda pair: pair[0].inputs)
        grid = [one for kind, alike in pairs for one in _validated(kind, alike, train, held_out)]
        grid = _agreed(grid, setup.encoder.device)
    chosen = best(grid)
    return grid, chosen, classifiers[grid.index(chosen)]


def _split(setup: Setup, train: Probed) -> tuple[Tensor, Tensor]:
    config = setup.config.linear
    fitted, held_out = split(train.labels, config.validation_share, config.seed)
    if not len(held_out):
        assert setup.train is not None
        chosen = "regularisation=0.01" if config.mode == "lbfgs" else "lr_factors=1"
        raise UserError(
            f"no class of {setup.train.uri} has two images, so none can be held out to choose a setting on; give more "
            f"data, or a single setting: layers=1 pooling=cls {chosen}"
        )
    return fitted, held_out


def search(
    grid: Sequence[Tried], train: Probed, fitted: Tensor, held_out: Tensor, classes: int, device: torch.device
) -> list[Tried]:
    """Fit every setting on one part of the training set and measure it on the other; settings of like inputs adjoin."""
    found: list[Tried] = []
    tried = track(grid, len(grid), f"fitting {len(grid)} linear probes on {len(fitted):,} images")
    for kind, alike in groupby(tried, lambda one: one.inputs):
        found += _validated(kind, _fits(kind, alike, train, fitted, classes, device), train, held_out)
    return _agreed(found, device)


def _fits(
    kind: Inputs, alike: Iterable[Tried], train: Probed, fitted: Tensor, classes: int, device: torch.device
) -> Iterator[tuple[Tried, Classifier]]:
    """Settings of like inputs with their classifiers; what they share is made once, and gone before the next kind's."""
    problem = Problem(kind.of(train.cls, train.patches, fitted).to(device), train.labels[fitted], classes)
    for one in alike:
        yield one, problem.solve(one.value)


def _validated(
    kind: Inputs, classifiers: Iterable[tuple[Tried, Classifier]], train: Probed, held_out: Tensor
) -> list[Tried]:
    """Settings of like inputs with their accuracy and loss on the images held out."""
    found: list[Tried] = []
    inputs, labels = kind.of(train.cls, train.patches, held_out), train.labels[held_out]
    for one, classifier in classifiers:
        inputs = inputs.to(classifier.weight.device)
        scores = classifier.scores(inputs).cpu()
        top1 = (ranks_of(scores, labels) == 1).double().mean()
        loss = F.cross_entropy(scores.double(), labels)
        found.append(Tried(one.inputs, one.value, float(top1), float(loss)))
    return found


def _agreed(grid: Sequence[Tried], device: torch.device) -> list[Tried]:
    """As the first rank measured it, lest rounding made ranks choose differently."""
    numbers = torch.tensor(
        [[one.validation_top1, one.validation_loss] for one in grid], dtype=torch.float64, device=device
    )
    ranks.broadcast([numbers])
    return [Tried(one.inputs, one.value, *row) for one, row in zip(grid, numbers.tolist(), strict=True)]
