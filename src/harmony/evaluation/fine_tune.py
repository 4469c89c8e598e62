"""fine_tune: the whole encoder trained as a classifier, as BEiT (arXiv 2106.08254) and MAE (2111.06377) do it.

The weights of the last step are measured, once; nothing is chosen on the data measured on.

Shapes: B images, C classes.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from harmony import ranks
from harmony.data.workers import count_workers, start_worker
from harmony.errors import UserError
from harmony.evaluation.class_labels import read_labels, training_labels
from harmony.evaluation.classification import accuracy, class_details, ranks_of, taken_for
from harmony.evaluation.crops import Crops, Read, spread
from harmony.evaluation.encoders import hash_of
from harmony.evaluation.fine_tune_batches import FineTuneBatches, FineTuneLoss
from harmony.evaluation.fitting import Average, fit
from harmony.evaluation.labelled import missing_pair
from harmony.evaluation.layer_decay import layer_groups
from harmony.evaluation.progress import say_left_out, track
from harmony.evaluation.results import Outcome
from harmony.evaluation.seeds import seeded
from harmony.evaluation.task import Card, Setup
from harmony.evaluation.timm_folder import write_timm_folder
from harmony.training.distributed import everyones, together


def missing(setup: Setup) -> str | None:
    """Why there is nothing to fine-tune on; None when there is."""
    if setup.data.class_names:
        return missing_pair(setup, "fine_tune")
    return f"fine_tune needs class names, and {setup.data.uri} has none; give it data with classes"


def card(setup: Setup) -> Card:
    """The protocol."""
    config, train = setup.config.fine_tune, setup.train
    assert train is not None
    erased = f"erasing {config.random_erasing:g}"
    augmented = "no RandAugment" if config.randaugment is None else f"RandAugment 2 x magnitude {config.randaugment}"
    length = f"{config.steps:,} steps" if config.steps else f"{config.epochs:g} epochs"
    average = "" if config.ema is None else f"; a moving average of the weights (momentum {config.ema:g}) is measured"
    return Card(
        resolution=f"{setup.size} px, positions resized; trained on random crops of {config.crop_scale[0]:g} to "
        f"{config.crop_scale[1]:g} of the image, measured on the central square of the image",
        split=f"learned from {100 * config.labels:g} % of the labels of {train.uri}, the same share of every class; "
        f"measured on every labelled example of {setup.shown(setup.data)}",
        selection="none: the weights after the last step are measured, once",
        optimiser=f"AdamW, learning rate {config.lr:g} for a batch of {config.train_batch_size}, layer decay "
        f"{config.layer_decay:g}, weight decay {config.weight_decay:g}, {config.precision}{average}",
        schedule=f"{length}, {config.warmup} warm-up, cosine to {config.final_lr:g}; drop path {config.drop_path:g}, "
        f"mixup {config.mixup:g}, CutMix {config.cutmix:g}, label smoothing {config.label_smoothing:g}, {augmented}, "
        f"{erased}, flips {config.flip:g}",
        differs="as BEiT and MAE but for length and learning rate, made for small data, and torchvision's RandAugment; "
        "they report the best epoch on the data measured on, this is the last",
    )


def run(setup: Setup) -> Outcome:
    """Fine-tune and measure.

    Raises:
        UserError: the encoder or the size does not suit, classes differ or are too few, or labels are wrong.
        TrainingError: the training diverges.
        Interrupted: a signal stopped it, after saving.
    """
    config, encoder, train = setup.config.fine_tune, setup.encoder, setup.train
    assert train is not None
    names = list(setup.data.class_names or [])
    model = classifier(setup, len(names))
    positions = spread(len(setup.data), setup.config.max_examples)
    read_labels(setup.data, positions, names, setup.config, max_pixels=None)
    labels = training_labels(train, names, config.labels, config.seed, setup.config, setup.max_pixels)
    batches = FineTuneBatches(train, labels, setup.size, config, encoder.mean, setup.max_pixels)
    average = None if config.ema is None else Average(model, config.ema)
    curve = fit(
        model,
        FineTuneLoss(model, encoder, len(names), config),
        batches,
        layer_groups(model, config.layer_decay),
        f"fine-tuning on {len(labels.labels):,} images",
        device=encoder.device,
        workers=setup.config.workers,
        work=setup.work,
        about={
            "encoder": encoder.fingerprint(),
            "data": train.stamp(),
            "labelled images": hash_of([("positions", labels.positions), ("labels", labels.labels)], ""),
            "classes": names,
            "size": setup.size,
        },
        after_step=average.update if average is not None else lambda step: None,
        also={} if average is None else {"average": average.model},
        deterministic=True,
    )
    measured = model if average is None else average.model
    read, scores, predicted = evaluate(measured, setup, positions)
    truth = torch.tensor(read.labels, dtype=torch.int64)
    metrics = accuracy(scores, truth, len(names))
    metrics |= {
        "examples": len(truth),
        "unlabelled": len(positions) - len(truth) - len(read.bad),
        "bad_examples": len(read.bad),
        "train_examples": len(labels.labels),
        "train_unlabelled": labels.unlabelled,
        "train_bad_examples": len(labels.bad),
        "train_loss": curve[-1][1],
    }
    if setup.work is not None:
        with together():
            if ranks.is_main():
                write_timm_folder(setup.work, measured, encoder, setup.size, names)
    details: dict[str, Any] = {"curve": [list(point) for point in curve], "steps": batches.steps}
    return Outcome(metrics, class_details(predicted, truth, names) | details)


def classifier(setup: Setup, classes: int) -> nn.Module:
    """The encoder's image tower with a new head, all weights trainable.

    Raises:
        UserError: it cannot take this size, or has not what the head is to read.
    """
    config, encoder = setup.config.fine_tune, setup.encoder
    model: Any = encoder.backbone(setup.size, config.drop_path)
    with seeded("head", config.seed):
        try:
            # Without a choice the argument is left out: not every timm model knows what None means there.
            model.reset_classifier(classes, *(() if config.pool is None else (config.pool,)))
        except Exception:  # timm's models refuse what they cannot pool in many ways
            raise UserError(
                f"{encoder.name} cannot be read by pool={config.pool}; leave it null for the model's own"
            ) from None
        for layer in cast(nn.Module, model.get_classifier()).modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                # Nearly zero, as in MAE: the first gradients do not come from a random head.
                nn.init.trunc_normal_(layer.weight, std=2e-5)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
    trained: nn.Module = model.to(encoder.device).requires_grad_(True)
    return trained


@torch.no_grad()
def evaluate(model: nn.Module, setup: Setup, positions: Any) -> tuple[Read, Tensor, Tensor]:
    """Classify the labelled examples at `positions`; under torchrun each process takes its share.

    Returns:
        What was read, without pixels and without what has no label; the rank of each true class; the predicted class.
    """
    encoder, config = setup.encoder, setup.config
    model.eval()
    crops = Crops(setup.data, positions[ranks.rank() :: ranks.count()], setup.size, setup.max_pixels)
    crops.batch_size = config.batch_size
    loader: DataLoader[Read] = DataLoader(
        crops,
        batch_size=None,
        num_workers=max(0, min(count_workers(config.workers, config.batch_size * 3 * setup.size**2), len(crops) - 1)),
        worker_init_fn=start_worker,
        generator=torch.Generator(),
    )
    read = Read()
    found: list[tuple[Tensor, Tensor]] = []
    for batch in track(loader, len(crops), f"classifying {len(positions):,} images"):
        if batch.pixels is not None:
            labels = torch.tensor(batch.labels)
            pixels = encoder.normalise(batch.pixels.to(encoder.device))
            with torch.autocast(encoder.device.type, torch.bfloat16, enabled=config.fine_tune.precision == "bf16"):
                scores = model(pixels).float().cpu()[labels >= 0]
            labels = labels[labels >= 0]
            true_ranks = ranks_of(scores, labels)
            found.append((true_ranks, taken_for(scores, labels, true_ranks)))
            batch.labels, batch.captions = labels.tolist(), []
        read.add(batch)
    return _joined(read, found, setup.data.uri)


def _joined(read: Read, found: list[tuple[Tensor, Tensor]], uri: str) -> tuple[Read, Tensor, Tensor]:
    """What all processes found."""
    every, both = Read(), []
    for part, pairs in everyones((read, found)):
        every.add(part)
        both += pairs
    if not every.labels:
        raise UserError(f"no labelled example of {uri} can be read; correct the data")
    say_left_out(uri, every.bad)
    scores, predicted = (torch.cat(part) for part in zip(*both, strict=True))
    return every, scores, predicted
