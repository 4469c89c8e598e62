"""Crops of one image predict each other's cluster, of clusters used alike (SwAV, arXiv 2006.09882).

Shapes: V crops that are clustered, C crops in all, B images on this rank, K prototypes, E width of the projection.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from harmony.data.batch import Batch
from harmony.data.views import ViewConfig
from harmony.errors import UserError
from harmony.models.heads import Prototypes
from harmony.models.projectors import ProjectorConfig, projector
from harmony.models.towers import Towers
from harmony.objectives.base import Encoded, ImageRequest, Objective, ObjectiveConfig, Request
from harmony.objectives.dino import cross_entropy_of_other_crops
from harmony.objectives.queues import Queue
from harmony.objectives.targets import signs_of_collapse, sinkhorn_knopp, unit
from harmony.schedules import At, Duration, DurationField, Positive, Schedule


class Swav(Objective):
    """Swapped prediction of cluster assignments (equations 1 and 2), with small crops that only predict.

    Pairs of crops are averaged, as in the published code; the paper adds them up.
    """

    class Config(ObjectiveConfig):
        """Settings of the prediction and of its targets."""

        view: Annotated[str, Field(description="the view whose crops are clustered")] = "global"
        local_view: Annotated[str | None, Field(description="a view whose crops only predict")] = "local"
        head: Annotated[ProjectorConfig, Field(description="sizes of the projector")] = ProjectorConfig()
        prototypes: Annotated[int, Field(ge=2, description="K, number of prototypes")] = 3000
        student_temperature: Annotated[Positive, Field(description="temperature of the predictions")] = (
            Schedule.constant(0.1)
        )
        target_temperature: Annotated[
            Positive, Field(description="temperature of the targets: the paper's epsilon, weight of their entropy")
        ] = Schedule.constant(0.05)
        iterations: Annotated[int, Field(ge=1, description="rounds of Sinkhorn-Knopp")] = 3
        freeze_prototypes: Annotated[DurationField, Field(description="how long the prototypes stay as they are")] = (
            Duration(amount=1, unit="epochs")
        )
        queue: Annotated[
            int, Field(ge=0, description="earlier projections of each crop that are clustered along; 0 for none")
        ] = 0
        queue_after: Annotated[DurationField, Field(description="how long the queue is not used, even if full")] = (
            Duration(amount=15, unit="epochs")
        )

        @model_validator(mode="after")
        def _other_crops(self) -> Self:
            if self.local_view == self.view:
                raise ValueError(f"local_view is the view {self.view!r} itself; name a view of small crops, or null")
            return self

    config: Config

    def __init__(self, config: Config, towers: Towers, views: Mapping[str, ViewConfig]) -> None:
        super().__init__(config, towers, views)
        self.head = projector(towers.image.width, config.head)
        self.prototypes = Prototypes(config.head.output, config.prototypes)
        self._renormalise()
        crops = views[config.view].count if config.view in views else 1
        self.queues = nn.ModuleList(Queue(config.queue, config.head.output) for _ in range(crops) if config.queue)
        self.student = [ImageRequest(config.view, pooled=True)]
        if config.local_view is not None:
            self.student.append(ImageRequest(config.local_view, pooled=True))
        elif config.view in views and crops == 1:
            raise UserError(
                f"objective swav compares different crops of an image, and there is one; set "
                f"views.{config.view}.count=2 or give it a local_view"
            )

    def requests(self) -> Sequence[Request]:
        return self.student

    def forward(self, batch: Batch, encoded: Encoded, at: At) -> dict[str, Tensor]:
        seen = torch.cat([encoded.image(request).cls for request in self.student])  # (C, B, D)
        # All crops, large and small, are normalised as one batch, as the published code does.
        projected = unit(self.head(seen.flatten(0, 1))).unflatten(0, seen.shape[:2])
        scores = self.prototypes(projected)  # (C, B, K)
        crops = len(encoded.image(self.student[0]).tokens)
        targets = torch.stack([self.targets(scores[crop], crop, at) for crop in range(crops)])
        loss = cross_entropy_of_other_crops(targets, (scores / at.student_temperature).log_softmax(-1), len(targets))
        for crop, queue in enumerate(self._queues()):
            queue.observe(projected[crop])
        if at.logged:
            self.signs = signs_of_collapse(targets.flatten(0, 1), loss)
        return {"swav": loss}

    @torch.no_grad()
    def targets(self, scores: Tensor, crop: int, at: At) -> Tensor:
        """(B, K) scores of one crop -> (B, K) assignments, balanced over all ranks and, where it is used, the queue."""
        clustered = scores.detach()
        if self.queues and at.clock.step >= self.config.queue_after.steps(at.clock):
            queue = self._queues()[crop]
            earlier = self.prototypes(queue.share())
            # Nothing of the queue is clustered along until it is full.
            clustered = torch.cat([clustered, earlier.masked_fill(~queue.is_full(), float("-inf"))])
        return sinkhorn_knopp(clustered, at.target_temperature, self.config.iterations)[: len(scores)]

    def _queues(self) -> list[Queue]:
        return [queue for queue in self.queues if isinstance(queue, Queue)]

    def _renormalise(self) -> None:
        with torch.no_grad():
            self.prototypes.direction.copy_(F.normalize(self.prototypes.direction, dim=1))

    def before_update(self, at: At) -> None:
        if at.clock.step < self.config.freeze_prototypes.steps(at.clock):
            self.prototypes.direction.grad = None

    def after_update(self, at: At) -> None:
        # Prototypes always count as unit vectors; as their lengths are brought back too, so are the steps they make.
        self._renormalise()
        for queue in self._queues():
            queue.update()
