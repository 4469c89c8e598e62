"""Language-image learning with a sigmoid for each pair (SigLIP, arXiv 2303.15343), here with soft targets as well.

Shapes: B pairs on this rank, G pairs on all ranks.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from harmony import ranks
from harmony.data.views import ViewConfig
from harmony.models.towers import Towers
from harmony.objectives.clip import Clip
from harmony.objectives.targets import cosines


class Siglip(Clip):
    """Every image-caption pair is judged alone: match or no match.

    The paper has hard targets only. Soft targets here are the teacher's distributions of both directions, averaged: how
    probable the teacher thinks it that the pair belongs together.
    """

    class Config(Clip.Config):
        """Settings of the sigmoid objective."""

        initial_scale: Annotated[float, Field(gt=0, description="factor of the similarities at the start")] = 10.0
        initial_bias: Annotated[float, Field(description="added to the scaled similarities at the start")] = -10.0

        @model_validator(mode="after")
        def _no_smoothing(self) -> Self:
            if self.label_smoothing:
                raise ValueError(
                    "label_smoothing spreads a softmax's target over the batch, and a sigmoid judges each pair alone; "
                    "set it to 0"
                )
            return self

    compares_images: ClassVar[bool] = False  # a pair is judged by itself
    config: Config

    def __init__(self, config: Config, towers: Towers, views: Mapping[str, ViewConfig]) -> None:
        super().__init__(config, towers, views)
        self.logit_bias = nn.Parameter(torch.tensor(config.initial_bias))

    def soft_targets(self, image: Tensor, text: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """(B, G) twice: the probability of each pair, the mean of both directions' distributions."""
        every_image, every_text = ranks.gather(image), ranks.gather(text)
        by_image = (cosines(image, every_text) / temperature).softmax(dim=1)
        own = slice(ranks.rank() * len(image), (ranks.rank() + 1) * len(image))
        by_text = (cosines(every_image, every_text) / temperature).softmax(dim=0)[own]
        both = (by_image + by_text) / 2
        return both, both

    def contrast(self, similarity: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> Tensor:
        """Binary cross-entropy summed over captions, averaged over images (equation 1 when targets are hard)."""
        logits = self.scale() * similarity[0] + self.logit_bias
        return F.binary_cross_entropy_with_logits(logits, targets[0], reduction="sum") / len(logits)
