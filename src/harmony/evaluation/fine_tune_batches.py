"""What fine-tuning learns from: augmented crops, and targets that are mixed and smoothed.

Crop, flip and RandAugment (arXiv 1909.13719) are done by the workers, one image at a time, in bytes. Random erasing
(1708.04896), mixup (1710.09412) and CutMix (1905.04899) are done on the device, on the whole batch.

Shapes: B images of this rank's share of a batch, S pixels a side, C classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from harmony.data.sources import Source
from harmony.evaluation.batches import read_again
from harmony.evaluation.class_labels import Labels
from harmony.evaluation.encoder import Encoder
from harmony.evaluation.fitting import Batches
from harmony.evaluation.settings import FineTuneConfig
from harmony.models.settings import Colour

Batch = tuple[Tensor, Tensor]
"""(B, 3, S, S) uint8 and (B,) int64."""


class FineTuneBatches(Batches[Batch]):
    """Augmented crops with their labels.

    Args:
        source: the training images.
        labels: which of them, and their labels.
        size: S.
        config: the settings.
        mean: the colour of what RandAugment moves into the picture, RGB of 0 .. 1.
        max_pixels: images with more pixels count as bad.
    """

    def __init__(
        self, source: Source, labels: Labels, size: int, config: FineTuneConfig, mean: Colour, max_pixels: int
    ) -> None:
        self.multiple = 2 if mixes(config) else 1  # timm's mixup pairs the images of a batch
        super().__init__(len(labels.positions), config)
        self.example_bytes = 3 * size**2
        self._source, self._labels, self._max_pixels = source, labels, max_pixels
        self._augment = augmentation(size, config, mean)

    def make(self, positions: Sequence[int]) -> Batch:
        places = self._labels.positions[positions].tolist()
        crops = [self._augment(read_again(self._source, place, self._max_pixels)) for place in places]
        return torch.stack(crops), self._labels.labels[positions]


def augmentation(size: int, config: FineTuneConfig, mean: Colour) -> v2.Transform:
    """(3, H, W) uint8 -> (3, S, S) uint8."""
    steps: list[nn.Module] = [
        v2.RandomResizedCrop(size, config.crop_scale, interpolation=InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(config.flip),
    ]
    if config.randaugment is not None:
        fill = [round(255 * channel) for channel in mean]
        steps.append(v2.RandAugment(num_ops=2, magnitude=config.randaugment, fill=fill))
    return v2.Compose(steps)


def mixes(config: FineTuneConfig) -> bool:
    """Whether images of a batch are mixed."""
    return config.mixed > 0 and (config.mixup > 0 or config.cutmix > 0)


class FineTuneLoss:
    """The cross-entropy of a batch with its mixed and smoothed targets.

    Args:
        model: (B, 3, S, S) -> (B, C).
        encoder: which normalises the crops and knows the device.
        classes: C.
        config: the settings.
    """

    def __init__(self, model: nn.Module, encoder: Encoder, classes: int, config: FineTuneConfig) -> None:
        self._model, self._encoder = model, encoder
        self._smoothing, self._classes = config.label_smoothing, classes
        self._mix: Mixup | None = None
        if mixes(config):
            self._mix = Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                prob=config.mixed,
                label_smoothing=config.label_smoothing,
                num_classes=classes,
            )
        self._erase = RandomErasing(config.random_erasing, mode="pixel", device=str(encoder.device))

    def __call__(self, batch: Batch) -> Tensor:
        pixels, targets = self.mixed(batch)
        return -(targets * F.log_softmax(self._model(pixels).float(), dim=-1)).sum(dim=-1).mean()

    def mixed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Inputs (B, 3, S, S), normalised, and targets (B, C), each of which sums to one."""
        crops, labels = (part.to(self._encoder.device, non_blocking=True) for part in batch)
        pixels = self._erase(self._encoder.normalise(crops))
        if self._mix is not None:
            mixed: tuple[Tensor, Tensor] = self._mix(pixels, labels)
            return mixed
        hard = F.one_hot(labels, self._classes).float()
        return pixels, hard * (1 - self._smoothing) + self._smoothing / self._classes
