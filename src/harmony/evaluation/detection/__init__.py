"""Detection: boxes, and masks where the data have them, around things; the whole encoder is trained (ViTDet).

A plain ViT with a simple feature pyramid and mostly windowed attention (arXiv 2203.16527) under the heads of Mask R-CNN
(1703.06870) or Cascade R-CNN (1712.00726), measured by COCO's average precision.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from harmony import ranks
from harmony.data.sources import BadExample, Source
from harmony.errors import UserError
from harmony.evaluation.crops import spread, tell_bad
from harmony.evaluation.detection.batches import Batch, DetectionBatches, moved
from harmony.evaluation.detection.details import details_of
from harmony.evaluation.detection.detector import Detector
from harmony.evaluation.detection.evaluator import evaluate
from harmony.evaluation.detection.finding import find
from harmony.evaluation.detection.windows import WindowedViT
from harmony.evaluation.encoder import off_patch
from harmony.evaluation.fitting import Group, fit
from harmony.evaluation.layer_decay import head_groups, layer_groups
from harmony.evaluation.progress import BAD_SHOWN, say
from harmony.evaluation.results import Outcome
from harmony.evaluation.seeds import seeded
from harmony.evaluation.settings import DetectionConfig
from harmony.evaluation.task import Card, Setup, measured_on_itself
from harmony.evaluation.weights_file import save_weights
from harmony.training.distributed import everyones


def missing(setup: Setup) -> str | None:
    """Why this data or encoder has no detection; None when it has."""
    if not setup.data.object_names:
        return f"detection needs boxes, and {setup.data.uri} has none; give it a COCO file, or scenes:"
    if setup.train is None:
        return "detection learns; name labelled data to learn from with --train-data"
    if not setup.train.object_names:
        return f"detection needs boxes to learn from, and {setup.train.uri} has none; name other --train-data"
    if list(setup.train.object_names) != list(setup.data.object_names):
        return (
            f"the classes of {setup.train.uri} ({_listed(setup.train.object_names)}) and of {setup.data.uri} "
            f"({_listed(setup.data.object_names)}) differ; give both the same categories in the same order"
        )
    return off_patch(setup.size, setup.encoder.patch) or measured_on_itself(setup.train, setup.data, "detection")


def card(setup: Setup) -> Card:
    """The protocol."""
    config = setup.config.detection
    assert setup.train is not None
    heads = "Mask R-CNN" if config.head == "mask_rcnn" else "Cascade Mask R-CNN, IoUs 0.5, 0.6, 0.7"
    what = heads if _with_masks(setup) else f"{heads}, boxes alone, as the data have no masks"
    attention = "global attention" if config.window is None else f"windows of {config.window} patches but in 4 blocks"
    length = f"{config.steps:,} steps" if config.steps else f"{config.epochs:g} epochs"
    return Card(
        resolution=f"longer side {setup.size} px, padded to a square; {attention}",
        split=f"learned from {setup.train.uri}, measured on {setup.shown(setup.data)}",
        selection=f"none: settings are fixed beforehand and the last weights are measured; {what}",
        optimiser=f"AdamW, learning rate {config.lr:g} for {config.train_batch_size} images, layer decay "
        f"{config.layer_decay:g}, weight decay {config.weight_decay:g}, drop path {config.drop_path:g}",
        schedule=f"{length}, {config.warmup} warm-up, then a cosine; scale jitter {config.scale[0]:g} to "
        f"{config.scale[1]:g}, mirroring",
        differs="ViTDet (arXiv 2203.16527) uses 1024 px and steps instead of a cosine; here the size is the encoder's "
        "own unless set, the encoder's final norm is kept, and windows at the border are smaller instead of padded",
    )


def run(setup: Setup) -> Outcome:
    """Train on one source, measure on the other. The checkpoint of the training stays for who writes the results.

    Raises:
        UserError: the encoder is no plain ViT, or the data have no thing in them.
    """
    assert setup.train is not None
    config = setup.config.detection
    positions = spread(len(setup.data), setup.config.max_examples)
    _require_things(setup.train, range(len(setup.train)))
    _require_things(setup.data, positions)
    detector = build(setup)
    _train(detector, setup)
    pages, bad = find(
        detector,
        setup.encoder,
        setup.data,
        positions,
        setup.size,
        min(setup.config.batch_size, config.train_batch_size),
        setup.config.workers,
        setup.max_pixels,
        config.precision == "bf16",
    )
    tell_bad(setup.data.uri, bad, len(positions))
    names = list(setup.data.object_names or ())
    boxes = evaluate(pages, names, masks=False)
    masks = evaluate(pages, names, masks=True) if detector.masks is not None else None
    metrics = {f"box_{name}": value for name, value in boxes.numbers.items()}
    metrics |= {f"mask_{name}": value for name, value in masks.numbers.items()} if masks is not None else {}
    metrics |= {
        "images": len(pages),
        "things": sum(not thing["iscrowd"] for page in pages for thing in page.truth),
        "empty_boxes": sum(page.empty for page in pages),
        "bad_examples": len(bad),
    }
    if setup.work is not None:
        save_weights(setup.work / "model.safetensors", detector.state_dict())
    return Outcome(metrics, details_of(pages, names, boxes, masks))


def build(setup: Setup) -> Detector:
    """The detector before it is trained: the encoder's weights, and new ones that the seed decides."""
    config = setup.config.detection
    with seeded("detection", config.seed):
        trunk = WindowedViT(setup.encoder.backbone(setup.size, config.drop_path), config.window, setup.encoder.name)
        names = setup.data.object_names or []
        return Detector(trunk, len(names), setup.size, _with_masks(setup), config).to(setup.encoder.device)


def groups(detector: Detector, config: DetectionConfig) -> list[Group]:
    """The encoder's parameters by block, each with a smaller learning rate than the next; then all others."""
    own = {id(parameter) for parameter in detector.trunk.parameters()}
    new = [parameter for parameter in detector.parameters() if id(parameter) not in own]
    return layer_groups(detector.trunk.model, config.layer_decay) + head_groups(new)


def _train(detector: Detector, setup: Setup) -> None:
    assert setup.train is not None
    config, encoder = setup.config.detection, setup.encoder
    with_masks = detector.masks is not None
    batches = DetectionBatches(setup.train, config, setup.size, encoder.mean, setup.max_pixels, with_masks)
    bad: set[str] = set()

    def loss(batch: Batch) -> Tensor:
        bad.update(batch.bad)
        pixels = encoder.normalise(batch.pixels.to(encoder.device, non_blocking=True))
        losses = detector.losses(pixels, batch.sizes, moved(batch.targets, encoder.device))
        return torch.stack(list(losses.values())).sum()

    fit(
        detector,
        loss,
        batches,
        groups(detector, config),
        f"learning detection from {len(setup.train):,} images",
        device=encoder.device,
        workers=setup.config.workers,
        work=setup.work,
        about={
            "task": "detection",
            "encoder": encoder.fingerprint(),
            "train": setup.train.stamp(),
            "names": list(setup.train.object_names or ()),
            "size": setup.size,
            "masks": with_masks,
        },
    )
    bad = set().union(*everyones(bad))
    if bad and ranks.is_main():
        shown = "; ".join(sorted(bad)[:BAD_SHOWN])
        say(f"{len(bad):,} training images cannot be read, and the ones after them were taken twice: {shown}")


def _with_masks(setup: Setup) -> bool:
    return setup.data.has_object_masks and setup.train is not None and setup.train.has_object_masks


def _require_things(source: Source, positions: Sequence[int]) -> None:
    """UserError when no example has a thing that can be learned or found; ends at the first that has one."""
    for position in positions:
        try:
            things = source[position].objects
        except BadExample:
            continue
        if things is not None and (~things.crowd & (things.boxes[:, 2:] > things.boxes[:, :2]).all(1)).any():
            return
    raise UserError(f"no image of {source.uri} has a box around a thing; correct its annotations")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
