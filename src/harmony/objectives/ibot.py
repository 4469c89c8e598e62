"""Self-distillation on masked patches (iBOT, arXiv 2111.07832).

Shapes: V crops, B images, N patches, M masked patches in all, K prototypes.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from harmony.data.batch import Batch
from harmony.data.masks import BlockMasks, MaskSampler, PatchMasks
from harmony.data.views import ViewConfig
from harmony.errors import UserError
from harmony.models.heads import HeadConfig, PrototypeHead
from harmony.models.towers import Towers, slow_copy
from harmony.objectives.base import Encoded, ImageRequest, Objective, ObjectiveConfig, Request
from harmony.objectives.dino import Dino
from harmony.objectives.targets import (
    Centre,
    Centring,
    Momentum,
    centred,
    full_precision,
    signs_of_collapse,
    sinkhorn_knopp,
)
from harmony.schedules import At, Duration, DurationField, Positive, Schedule


class Ibot(Objective):
    """The student predicts, at each hidden patch, what the teacher makes of the patch it sees."""

    class Config(ObjectiveConfig):
        """Settings of the masked-patch objective."""

        view: Annotated[str, Field(description="the view whose patches are hidden")] = "global"
        masks: Annotated[PatchMasks, Field(description="its mask: a kind, which is also its name, and settings")] = (
            BlockMasks()
        )
        head: Annotated[
            HeadConfig | str, Field(description="a head of its own, or the objective that lends its head")
        ] = HeadConfig()
        student_temperature: Annotated[Positive, Field(description="temperature of the student's softmax")] = (
            Schedule.constant(0.1)
        )
        teacher_temperature: Annotated[Positive, Field(description="temperature of the targets")] = Schedule.parse(
            {"linear": {"from": 0.04, "to": 0.07, "over": "5 epochs"}}
        )
        centring: Centring = "momentum"
        centre_momentum: Momentum = 0.9
        freeze_prototypes: Annotated[
            DurationField, Field(description="how long the last layer of its own head stays as it is")
        ] = Duration(amount=1, unit="epochs")

    config: Config

    def __init__(self, config: Config, towers: Towers, views: Mapping[str, ViewConfig]) -> None:
        super().__init__(config, towers, views)
        self.mask = config.masks.kind
        self.teacher = ImageRequest(config.view, model="teacher")
        self.student = ImageRequest(config.view, replace=self.mask)
        self.lender: Dino | None = None
        if isinstance(config.head, HeadConfig):
            self.head = PrototypeHead(towers.image.width, config.head)
            self.teacher_head = slow_copy(self.head)
            self.centre = Centre(config.head.prototypes, config.centre_momentum)

    def borrow(self, others: Mapping[str, Objective]) -> None:
        if isinstance(self.config.head, HeadConfig):
            return
        lender = others.get(self.config.head)
        if not isinstance(lender, Dino):
            raise UserError(
                f"objective ibot borrows the head of {self.config.head!r}, which is not a dino objective of this "
                "recipe; set objectives.ibot.head to sizes of its own, such as {prototypes: 8192}"
            )
        # Kept outside the module tree: the head's parameters belong to the lender.
        object.__setattr__(self, "lender", lender)
        self.centre = Centre(lender.config.head.prototypes, self.config.centre_momentum)

    def masks(self) -> Mapping[str, MaskSampler]:
        return {self.mask: self.config.masks.on(self.config.view)}

    def requests(self) -> Sequence[Request]:
        return [self.teacher, self.student]

    def slow_twins(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        return [] if self.lender else [(self.head, self.teacher_head)]

    def forward(self, batch: Batch, encoded: Encoded, at: At) -> dict[str, Tensor]:
        head, teacher_head = self._heads()
        mask = batch.masks[self.mask]
        hidden = encoded.image(self.student).patches.flatten(0, 2)[mask.index]  # (M, D)
        log_student = (full_precision(head(hidden)) / at.student_temperature).log_softmax(dim=-1)
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

    def targets(self, scores: Tensor, temperature: float) -> Tensor:
        """(M, K) teacher scores -> (M, K) target distributions."""
        if self.config.centring == "sinkhorn_knopp":
            return sinkhorn_knopp(scores, temperature)
        return centred(scores, self.centre, temperature)

    def _heads(self) -> tuple[PrototypeHead, PrototypeHead]:
        owner = self.lender or self
        return owner.head, owner.teacher_head

    def before_update(self, at: At) -> None:
        if not self.lender and at.clock.step < self.config.freeze_prototypes.steps(at.clock):
            self.head.prototypes.direction.grad = None

    def after_update(self, at: At) -> None:
        self.centre.update()

    def after_skip(self) -> None:
        self.centre.forget()
