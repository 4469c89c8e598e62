"""Contrastive language-image learning with soft targets.

CLIP (arXiv 2103.00020) with the teacher's similarities mixed into the targets (Harmony, arXiv 2405.14239): hard targets
say that an image matches its own caption alone; soft targets say how well the slow towers think that it matches each.

Shapes: B pairs on this rank, G pairs on all ranks, E shared width.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from harmony import ranks
from harmony.data.batch import Batch
from harmony.data.views import ViewConfig
from harmony.models.towers import Towers
from harmony.objectives.base import Encoded, ImageRequest, Objective, ObjectiveConfig, Request, TextRequest
from harmony.objectives.targets import cosines, unit
from harmony.schedules import At, Positive, Schedule, Share


class Clip(Objective):
    """Symmetric InfoNCE between images and captions."""

    class Config(ObjectiveConfig):
        """Settings of the contrastive objective; `hard_weight: 1` is plain CLIP."""

        view: Annotated[str, Field(description="the view whose first crop meets the caption")] = "global"
        crops: Annotated[
            int, Field(ge=1, description="how many of the view's crops meet the caption, each for itself")
        ] = 1
        keep: Annotated[
            str | None, Field(description="a mask (drawn by another objective) whose patches are left out of the image")
        ] = None
        hard_weight: Annotated[
            Share, Field(description="weight of the hard targets; the rest goes to the teacher's")
        ] = Schedule.constant(1.0)
        soft_temperature: Annotated[Positive, Field(description="temperature of the teacher's targets")] = (
            Schedule.constant(0.1)
        )
        label_smoothing: Annotated[
            float, Field(ge=0, lt=1, description="share of a hard target that is spread over all pairs of the batch")
        ] = 0.0
        initial_scale: Annotated[float, Field(gt=0, description="factor of the similarities at the start")] = 1 / 0.07
        max_scale: Annotated[float | None, Field(gt=0, description="its upper bound; null for none (as published)")] = (
            100.0
        )

    compares_images: ClassVar[bool] = True
    config: Config

    def __init__(self, config: Config, towers: Towers, views: Mapping[str, ViewConfig]) -> None:
        super().__init__(config, towers, views)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(config.initial_scale)))
        self._bound()
        crops = tuple(range(config.crops))
        self.image = ImageRequest(config.view, crops=crops, keep=config.keep, pooled=True)
        self.text = TextRequest(pooled=True)
        self.slow_image = ImageRequest(config.view, crops=crops, model="teacher", pooled=True)
        self.slow_text = TextRequest(model="teacher", pooled=True)

    @property
    def has_soft_targets(self) -> bool:
        hard = self.config.hard_weight
        return not (hard.start == 1 and hard.stop == 1)

    def requests(self) -> Sequence[Request]:
        hard: list[Request] = [self.image, self.text]
        return [*hard, self.slow_image, self.slow_text] if self.has_soft_targets else hard

    def forward(self, batch: Batch, encoded: Encoded, at: At) -> dict[str, Tensor]:
        losses = [self._meet(crop, encoded, at) for crop in range(self.config.crops)]
        return {"clip": torch.stack(losses).mean()}

    def _meet(self, crop: int, encoded: Encoded, at: At) -> Tensor:
        """The loss of one crop of each image and the captions."""
        image = unit(encoded.image(self.image).crop(crop).embed())
        text = unit(encoded.text(self.text).embed())
        every_image, every_text = ranks.gather(image), ranks.gather(text)
        hard, soft = self.hard_targets(image), None
        if self.has_soft_targets:
            slow_image = unit(encoded.image(self.slow_image).crop(crop).embed())
            slow_text = unit(encoded.text(self.slow_text).embed())
            soft = self.soft_targets(slow_image, slow_text, at.soft_temperature)
        similarity = (cosines(image, every_text), cosines(text, every_image))
        loss = self.contrast(similarity, hard)
        if soft is not None:
            loss = at.hard_weight * loss + (1 - at.hard_weight) * self.contrast(similarity, soft)
        if at.logged and crop == 0:
            self.signs = {
                "temperature": 1 / self.scale().detach(),
                "batch_accuracy": (similarity[0].argmax(1) == hard[0].argmax(1)).double().mean(),
            }
        return loss

    def scale(self) -> Tensor:
        """The learned factor of the similarities."""
        return self.logit_scale.exp()

    def _bound(self) -> None:
        # The parameter is bounded and not its use: a clamp passes no gradient back, so the scale would stay there.
        if self.config.max_scale is not None:
            self.logit_scale.data.clamp_(max=math.log(self.config.max_scale))

    def hard_targets(self, local: Tensor) -> tuple[Tensor, Tensor]:
        """(B, G) twice: one where a pair of this rank meets itself, else zero; smoothed if so set (arXiv 1512.00567).

        The teacher's soft targets are left as they are: what they give to other pairs is what it knows of them.
        """
        pairs = len(local) * ranks.count()
        place = torch.arange(len(local), device=local.device) + ranks.rank() * len(local)
        own = (place[:, None] == torch.arange(pairs, device=local.device)).to(local.dtype)
        if self.config.label_smoothing:
            own = own.lerp(torch.full_like(own, 1 / pairs), self.config.label_smoothing)
        return own, own

    def soft_targets(self, image: Tensor, text: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """(B, G) twice: the teacher's image-to-text and text-to-image distributions, from unit vectors (B, E)."""
        to_text = (cosines(image, ranks.gather(text)) / temperature).softmax(dim=1)
        to_image = (cosines(text, ranks.gather(image)) / temperature).softmax(dim=1)
        return to_text, to_image

    def contrast(self, similarity: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy of both directions, from cosines (B, G) and target distributions (B, G)."""
        scale = self.scale()
        directions = [F.cross_entropy(scale * s, t) for s, t in zip(similarity, targets, strict=True)]
        return torch.stack(directions).mean()

    def after_update(self, at: At) -> None:
        self._bound()
