"""Self-distillation on masked patches (iBOT, arXiv 2111.07832).

Shapes: V crops, B images, N patches, M masked patches in all, K prototypes.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from harmony.data.batch import Batch
from harmony.data.masks import BlockMasks, MaskSampler, PatchMasks
from harmony.data.views import ViewConfig
from harmony.models.heads import HeadConfig
from harmony.models.towers import Towers
from harmony.objectives.base import Encoded, ImageRequest, Objective, Request
from harmony.objectives.prototypes import PrototypeConfig, PrototypeObjective
from harmony.objectives.targets import full_precision, signs_of_collapse
from harmony.schedules import At


class Ibot(PrototypeObjective):
    """The student predicts, at each hidden patch, what the teacher makes of the patch it sees."""

    class Config(PrototypeConfig):
        """Settings of the masked-patch objective."""

        view: Annotated[str, Field(description="the view whose patches are hidden")] = "global"
        masks: Annotated[PatchMasks, Field(description="its mask: a kind, which is also its name, and settings")] = (
            BlockMasks()
        )
        head: Annotated[
            HeadConfig | str, Field(description="a head of its own, or the objective that lends its head")
        ] = HeadConfig()

    config: Config

    def __init__(self, config: Config, towers: Towers, views: Mapping[str, ViewConfig]) -> None:
        super().__init__(config, towers, views)
        self.mask = config.masks.kind
        self.teacher = ImageRequest(config.view, model="teacher")
        self.student = ImageRequest(config.view, replace=self.mask)
        if isinstance(config.head, HeadConfig):
            self.own_head(towers.image.width, config.head)

    def borrow(self, others: Mapping[str, Objective]) -> None:
        if isinstance(self.config.head, str):
            self.borrow_head(self.config.head, others)

    def masks(self) -> Mapping[str, MaskSampler]:
        return {self.mask: self.config.masks.on(self.config.view)}

    def requests(self) -> Sequence[Request]:
        return [self.teacher, self.student]

    def forward(self, batch: Batch, encoded: Encoded, at: At) -> dict[str, Tensor]:
        head, teacher_head = self.heads()
        mask = batch.masks[self.mask]
        hidden = encoded.image(self.student).patches.flatten(0, 2)[mask.index]  # (M, D)
        log_student = self.log_predictions(head(hidden), at)
        with torch.no_grad():
            patches = encoded.image(self.teacher).patches.flatten(0, 2)  # (V * B * N, D)
            bottleneck = teacher_head.bottleneck(patches)
            scores = full_precision(teacher_head.prototypes(bottleneck[mask.index]))
            targets = self.targets(scores, at.teacher_temperature)
            # The last layer is linear, so the mean score of all patches is the score of the mean: no (V B N, K) tensor.
            self.centre.observe_mean(full_precision(teacher_head.prototypes(bottleneck.mean(0))), len(bottleneck))
        cross_entropy = -(targets * log_student).sum(-1)
        images = mask.masked.shape[0] * mask.masked.shape[1]
        loss = (cross_entropy * mask.share(cross_entropy.dtype)).sum() / images
        if at.logged:
            self.signs = signs_of_collapse(targets, cross_entropy.sum() / max(len(targets), 1))
        return {"ibot": loss}
