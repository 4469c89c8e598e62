"""Self-distillation on the class token (DINO, arXiv 2104.14294).

Shapes: V crops of the teacher's view, C crops in all, B images, K prototypes.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from harmony.data.batch import Batch
from harmony.data.views import ViewConfig
from harmony.errors import UserError
from harmony.models.heads import HeadConfig
from harmony.models.towers import Towers
from harmony.objectives.base import Encoded, ImageRequest, Request
from harmony.objectives.prototypes import PrototypeConfig, PrototypeObjective
from harmony.objectives.targets import full_precision, signs_of_collapse
from harmony.schedules import At, Positive, Schedule


class Dino(PrototypeObjective):
    """The student's every crop predicts how the teacher sees the other, large crops of the same image."""

    class Config(PrototypeConfig):
        """Settings of the class-token objective."""

        view: Annotated[str, Field(description="the view that the teacher sees and the student too")] = "global"
        local_view: Annotated[str | None, Field(description="a view that only the student sees")] = "local"
        student_sees: Annotated[
            Literal["all", "local"],
            Field(description="the student's crops: all, or the local ones alone, as in SILC (arXiv 2310.13355)"),
        ] = "all"
        mask: Annotated[
            str | None, Field(description="a mask (drawn by another objective) on the student's large crops")
        ] = None
        keep: Annotated[
            str | None, Field(description="likewise a mask, whose patches are left out of the student's large crops")
        ] = None
        head: Annotated[HeadConfig, Field(description="sizes of the prototype head")] = HeadConfig()
        teacher_temperature: Annotated[Positive, Field(description="temperature of the targets")] = Schedule.constant(
            0.04
        )

        @model_validator(mode="after")
        def _local_crops_alone(self) -> Self:
            if self.student_sees == "local" and self.local_view is None:
                raise ValueError("student_sees: local needs a local_view; name one, or set student_sees to all")
            if self.student_sees == "local" and (self.mask is not None or self.keep is not None):
                raise ValueError("a mask is for the student's large crops, which student_sees: local leaves out")
            if self.local_view == self.view:
                raise ValueError(f"local_view is the view {self.view!r} itself; name a view of small crops, or null")
            return self

    lends_head: ClassVar[bool] = True
    config: Config

    def __init__(self, config: Config, towers: Towers, views: Mapping[str, ViewConfig]) -> None:
        super().__init__(config, towers, views)
        self.own_head(towers.image.width, config.head)
        self.teacher = ImageRequest(config.view, model="teacher", pooled=True)
        self.student: list[ImageRequest] = []
        if config.student_sees == "all":
            self.student.append(ImageRequest(config.view, replace=config.mask, keep=config.keep, pooled=True))
        if config.local_view is not None:
            self.student.append(ImageRequest(config.local_view, pooled=True))
        elif views[config.view].count == 1:
            raise UserError(
                f"objective dino compares different crops of an image, and there is one; set "
                f"views.{config.view}.count=2 or give it a local_view"
            )

    def requests(self) -> Sequence[Request]:
        return [self.teacher, *self.student]

    def forward(self, batch: Batch, encoded: Encoded, at: At) -> dict[str, Tensor]:
        seen = torch.cat([encoded.image(request).cls for request in self.student])  # (C, B, D)
        log_student = self.log_predictions(self.head(seen.flatten(0, 1)), at).unflatten(0, seen.shape[:2])
        with torch.no_grad():
            slow = encoded.image(self.teacher).cls  # (V, B, D)
            scores = self.teacher_head(slow.flatten(0, 1))
            targets = self.targets(scores, at.teacher_temperature).unflatten(0, slow.shape[:2])
            self.centre.observe(full_precision(scores))
        common = len(targets) if self.config.student_sees == "all" else 0
        loss = cross_entropy_of_other_crops(targets, log_student, common)
        if at.logged:
            self.signs = signs_of_collapse(targets.flatten(0, 1), loss)
        return {"dino": loss}


def cross_entropy_of_other_crops(targets: Tensor, log_student: Tensor, common: int) -> Tensor:
    """Mean over images and over every pair of a teacher's crop and a different student's crop (equation 3).

    Args:
        targets: (V, B, K) distributions of the teacher.
        log_student: (C, B, K) log-distributions of the student.
        common: V when the student's first V crops are the teacher's, 0 when they have no crop in common.
    """
    # The sum over all students less the same crop's is the sum over the others, without (V, C) products.
    unlike = log_student.sum(0, keepdim=True)
    if common:
        unlike = unlike - log_student[:common]
    pairs = len(targets) * len(log_student) - common
    return -(targets * unlike).sum() / (pairs * targets.shape[1])
