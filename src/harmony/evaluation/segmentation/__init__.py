"""Semantic segmentation: a class for every pixel, by a head on the encoder's patches.

linear         frozen encoder; batch norm and a linear layer on the last block's patches (DINOv2)
multi_linear   likewise on the last four blocks' patches, side by side (DINOv2)
upernet        encoder and UPerNet trained together, learning rates decaying layer by layer (BEiT, MAE, iBOT)
zero_shot      nothing is trained: a patch is the class whose name the text tower finds most similar

Measured at the images' own size, over the pixels of all images together.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from harmony import ranks
from harmony.errors import UserError
from harmony.evaluation.encoder import off_patch
from harmony.evaluation.fitting import Group, fit
from harmony.evaluation.layer_decay import head_groups
from harmony.evaluation.results import Outcome
from harmony.evaluation.seeds import seeded
from harmony.evaluation.segmentation.crops import TrainingCrops
from harmony.evaluation.segmentation.data import count_classes, require_usable
from harmony.evaluation.segmentation.heads import MULTI_LAYERS, LinearSegmenter, Segmenter, patch_width
from harmony.evaluation.segmentation.measure import Measured, measure, positions_of, short_side
from harmony.evaluation.segmentation.upernet import UPerNet, parameter_groups
from harmony.evaluation.segmentation.zero_shot import ZeroShotSegmenter
from harmony.evaluation.task import Card, Setup, measured_on_itself
from harmony.evaluation.weights_file import save_weights


def missing(setup: Setup) -> str | None:
    """Why this data or encoder cannot be segmented; None when it can."""
    data, train, encoder = setup.data, setup.train, setup.encoder
    if not data.mask_names:
        return f"segmentation needs a mask for each image, and {data.uri} has none; name data with masks"
    if len(data.mask_names) == 1:
        return (
            f"{data.uri} has one class, {data.mask_names[0]!r}, and nothing to confuse it with; segmentation needs two "
            "or more"
        )
    wrong_size = off_patch(setup.size, encoder.patch)
    if wrong_size:
        return wrong_size
    if setup.config.segmentation.head == "zero_shot":
        if not encoder.reads_text:
            return "head=zero_shot needs a text tower, and this model was trained on images alone; set head=linear"
        return None
    if train is None:
        return "segmentation learns from images with masks; name them with --train-data (in a recipe evaluation.train)"
    if not train.mask_names:
        return f"segmentation learns from masks, and {train.uri} has none; name training data with masks"
    if train.mask_names != data.mask_names:
        return (
            f"the classes of {train.uri} ({_few(train.mask_names)}) are not those of {data.uri} "
            f"({_few(data.mask_names)}); use data with the same classes in the same order"
        )
    return measured_on_itself(train, data, "segmentation")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f", ... {len(names)} in all" if len(names) > 5 else "")


def card(setup: Setup) -> Card:
    """The protocol."""
    config, short = setup.config.segmentation, short_side(setup)
    resized = "images as they are" if short is None else f"shorter side resized to {short} px"
    scales = ", ".join(f"{scale:g}" for scale in config.test_scales) + (" and mirrored" if config.test_flip else "")
    whole = f"{resized}; windows of {setup.size} px, {config.stride:.0%} apart, scores averaged; scales {scales}; "
    resolution = whole + "measured at the images' own size"
    if config.head == "zero_shot":
        return Card(
            resolution,
            split=f"nothing is learned; measured on {setup.shown(setup.data)}",
            selection="none",
            optimiser="none",
            schedule=f"templates {config.templates}",
            differs="each patch is put into the shared space as the class token is, with no change to the encoder "
            "(MaskCLIP, arXiv 2112.01071, changes the last block's attention)",
        )
    assert setup.train is not None
    crops = f"scale {config.scale[0]:g} to {config.scale[1]:g}, crop of {setup.size} px, flip"
    trained = f"{config.steps} steps" if config.steps is not None else f"{config.epochs:g} epochs"
    layered = f", the encoder's times {config.backbone_lr_scale:g} and decaying by {config.layer_decay:g} a block"
    differs = {
        "linear": "as DINOv2's linear head, with a cosine schedule and a length in epochs in place of 40k steps",
        "multi_linear": "DINOv2's head with the last four blocks and no multi-scale test unless set; cosine schedule",
        "upernet": "as BEiT's, which trains 160k steps (127 epochs of ADE20K) at one rate for encoder and head",
    }
    return Card(
        resolution,
        split=f"learned from {setup.train.uri}, measured on {setup.shown(setup.data)}",
        selection="none: the weights after the last step are measured",
        optimiser=f"AdamW, learning rate {config.lr:g}{layered if config.head == 'upernet' else ''}, weight decay "
        f"{config.weight_decay:g}, batches of {config.train_batch_size}",
        schedule=f"{trained}, warm-up {config.warmup}, cosine to {config.final_lr:g}; {crops}"
        + (", colour" if config.photometric else ""),
        differs=differs[config.head],
    )


def run(setup: Setup) -> Outcome:
    """Train the head, and measure.

    Raises:
        UserError: the encoder gives no patch maps or cannot be trained, no example can be used, or a batch is too small
            for the head.
    """
    config = setup.config.segmentation
    segmenter, groups = build(setup)
    require_usable(setup.data, positions_of(setup), setup.max_pixels)
    extra: dict[str, float] = {}
    usual = None
    if setup.train is not None and config.head != "zero_shot":
        counted = count_classes(setup.train, setup.config.workers, setup.max_pixels)
        train(segmenter, groups, counted.usable, setup)
        usual = int(counted.pixels.argmax())
        extra = {"train_images": len(counted.usable), "train_bad_examples": len(counted.bad)}
    measured = measure(segmenter, setup)
    return Outcome(_metrics(measured, usual) | extra, _details(measured, setup))


def build(setup: Setup) -> tuple[Segmenter, list[Group]]:
    """The head that the settings ask for, untrained, and what is to be trained of it.

    Raises:
        UserError: the encoder does not suit it.
    """
    config, encoder = setup.config.segmentation, setup.encoder
    names = setup.data.mask_names or []
    segmenter: Segmenter
    with seeded("segmentation head", config.seed):
        if config.head == "zero_shot":
            return ZeroShotSegmenter.of(encoder, names, config.templates, setup.size), []
        if config.head == "upernet":
            backbone = encoder.backbone(setup.size, config.drop_path)
            segmenter = UPerNet(backbone, encoder.depth, setup.size, len(names), config.channels)
        else:
            layers = 1 if config.head == "linear" else min(MULTI_LAYERS, encoder.depth)
            width = patch_width(encoder, setup.size, layers)
            segmenter = LinearSegmenter(encoder, layers, width, len(names))
    if ranks.count() > 1 and encoder.device.type == "cuda":  # there is none for the CPU
        segmenter = nn.SyncBatchNorm.convert_sync_batchnorm(segmenter)
    segmenter = segmenter.to(encoder.device)
    if isinstance(segmenter, UPerNet):
        return segmenter, parameter_groups(segmenter, config.layer_decay, config.backbone_lr_scale)
    return segmenter, head_groups(segmenter.parameters())


def train(segmenter: Segmenter, groups: Sequence[Group], usable: Sequence[int], setup: Setup) -> None:
    """Train in place on the usable examples of `setup.train`, and leave the weights in `setup.work`."""
    assert setup.train is not None
    config, encoder = setup.config.segmentation, setup.encoder
    crops = TrainingCrops(setup.train, usable, config, setup.size, short_side(setup), encoder.mean, setup.max_pixels)
    if config.head == "upernet" and crops.batch_size // ranks.count() < 2:
        raise UserError(
            "upernet's batch norm needs at least two crops a process, and a batch has "
            f"{crops.batch_size}; set a larger train_batch_size, or use more training images"
        )

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        pixels, masks = (part.to(encoder.device, non_blocking=True) for part in batch)
        return segmenter.loss(encoder.normalise(pixels), masks)

    about = {
        "task": "segmentation",
        "encoder": encoder.fingerprint(),
        "train": setup.train.stamp(),
        "names": setup.train.mask_names,
        "examples": len(usable),
        "size": setup.size,
    }
    fit(
        segmenter,
        loss,
        crops,
        groups,
        f"training {config.head} on {len(usable):,} images",
        device=encoder.device,
        workers=setup.config.workers,
        work=setup.work,
        about=about,
    )
    # Where batch norm does not cross ranks, each has seen other crops; all go on with the first one's.
    ranks.broadcast(list(segmenter.state_dict().values()))
    if setup.work is not None:
        save_weights(setup.work / "model.safetensors", segmenter.state_dict())


def _metrics(measured: Measured, usual: int | None) -> dict[str, float]:
    """The scores beside those of always predicting one class: the most frequent one that could be learned from."""
    confusion = measured.confusion
    guess = int(confusion.counts.sum(1).argmax()) if usual is None else usual
    chance = {f"chance_{name}": score for name, score in confusion.always(guess).scores().items()}
    pixels = int(confusion.counts.sum())
    return (
        confusion.scores()
        | chance
        | {
            "images": measured.images,
            "bad_examples": len(measured.bad),
            "unlabelled_pixels": confusion.ignored / (pixels + confusion.ignored),
        }
    )


def _details(measured: Measured, setup: Setup) -> dict[str, object]:
    names = setup.data.mask_names or []
    return {
        "head": setup.config.segmentation.head,
        "names": names,
        "classes": measured.confusion.classes(names),
        "examples": measured.examples,
    }
