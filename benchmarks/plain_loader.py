"""The yardstick: what Harmony's published loader does for each image, as a plain pipeline of PIL and torchvision.

Decode at full size, then ten times: cut and resize in PIL, mirror, jitter, grey, blur, solarize in PIL, to a tensor,
normalise; then the caption's tokens; then stack the batch. Its masks are left out, which it makes besides.
"""

import io
import random
from collections.abc import Sequence

import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from harmony.data.captions import Tokenizer
from harmony.data.photometric import PhotometricConfig
from harmony.data.sources.base import Source
from harmony.data.views import ViewConfig


class Blur:
    """Gaussian blur with a probability, of a deviation uniform in a range."""

    def __init__(self, probability: float, sigma: tuple[float, float]) -> None:
        self.probability, self.sigma = probability, sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() >= self.probability:
            return image
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*self.sigma)))


class Solarize:
    """Bright pixels inverted with a probability."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image) if random.random() < self.probability else image


def transform(view: ViewConfig, look: PhotometricConfig, mean: Sequence[float], std: Sequence[float]):
    """One crop's pipeline, as torchvision's first transforms and PIL have it."""
    jitter = transforms.ColorJitter(look.brightness, look.contrast, look.saturation, look.hue)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(view.size, view.scale, view.ratio, InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(view.flip),
            transforms.RandomApply([jitter], look.jitter),
            transforms.RandomGrayscale(look.grayscale),
            Blur(look.blur, look.sigma),
            Solarize(look.solarize),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


class PlainLoader:
    """Makes batches of crops, one image and one crop after the other."""

    def __init__(
        self,
        source: Source,
        views: dict[str, ViewConfig],
        tokenizer: Tokenizer,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.source, self.tokenizer = source, tokenizer
        self.transforms = {
            name: [transform(view, look, mean, std) for look in view.looks] for name, view in views.items()
        }

    def batch(self, examples: Sequence[int]) -> tuple[dict[str, list[Tensor]], Tensor]:
        """By view name its V crops, (B, 3, S, S) float32 each; and token ids (B, T)."""
        rows = [self._example(index) for index in examples]
        crops = {
            name: [torch.stack([row[0][name][v] for row in rows]) for v in range(len(several))]
            for name, several in self.transforms.items()
        }
        return crops, torch.stack([row[1] for row in rows])

    def _example(self, index: int) -> tuple[dict[str, list[Tensor]], Tensor]:
        example = self.source[index]
        assert isinstance(example.image, bytes)
        image = Image.open(io.BytesIO(example.image)).convert("RGB")
        crops = {name: [one(image) for one in several] for name, several in self.transforms.items()}
        ids = torch.zeros(self.tokenizer.context, dtype=torch.int64)
        tokens = self.tokenizer.encode([random.choice(example.captions)])[0]
        ids[: len(tokens)] = tokens
        return crops, ids
