"""Queries find the keys that a slow encoder makes of another crop (MoCo v3, arXiv 2104.02057).

Shapes: B images on this rank, G images on all ranks, L keys in the queue, E width of queries and keys.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from harmony import ranks
from harmony.data.batch import Batch
from harmony.data.views import ViewConfig
from harmony.models.projectors import MlpConfig, ProjectorConfig, mlp, projector
from harmony.models.towers import Towers, slow_copy
from harmony.objectives.base import Encoded, ImageRequest, Objective, ObjectiveConfig, Request
from harmony.objectives.queues import Queue
from harmony.objectives.targets import cosines, unit
from harmony.schedules import At, Positive, Schedule


class Mocov3(Objective):
    """Symmetric InfoNCE between the student's queries and the teacher's keys (algorithm 1)."""

    class Config(ObjectiveConfig):
        """Settings of the contrast between queries and keys."""

        view: Annotated[str, Field(description="the view whose first two crops are compared")] = "global"
        head: Annotated[ProjectorConfig, Field(description="sizes of the projector")] = ProjectorConfig(
            hidden=4096, output=256, layers=3, norm="all"
        )
        predictor: Annotated[MlpConfig, Field(description="sizes of the predictor, which makes the queries")] = (
            MlpConfig(hidden=4096, layers=2, norm="all")
        )
        temperature: Annotated[Positive, Field(description="temperature of the similarities")] = Schedule.constant(0.2)
        queue: Annotated[
            int,
            Field(ge=0, description="earlier keys that take the place of the batch's other ones (MoCo v1); 0 for none"),
        ] = 0

    compares_images: ClassVar[bool] = True
    config: Config

    def __init__(self, config: Config, towers: Towers, views: Mapping[str, ViewConfig]) -> None:
        super().__init__(config, towers, views)
        self.head = projector(towers.image.width, config.head)
        self.predictor = mlp(config.head.output, config.predictor, config.head.output)
        self.teacher_head = slow_copy(self.head)
        self.queue = Queue(config.queue, config.head.output) if config.queue else None
        self.student = ImageRequest(config.view, crops=(0, 1), pooled=True)
        self.teacher = ImageRequest(config.view, crops=(0, 1), model="teacher", pooled=True)

    def requests(self) -> Sequence[Request]:
        return [self.teacher, self.student]

    def slow_twins(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        return [(self.head, self.teacher_head)]

    def forward(self, batch: Batch, encoded: Encoded, at: At) -> dict[str, Tensor]:
        # Each crop passes the heads by itself, so their norms see one crop of every image.
        queries = [unit(self.predictor(self.head(seen))) for seen in encoded.image(self.student).cls]
        with torch.no_grad():
            keys = [unit(self.teacher_head(seen)) for seen in encoded.image(self.teacher).cls]
        logits = [
            self.similarities(queries[0], keys[1]),
            self.similarities(queries[1], keys[0]),
        ]  # 2 of (B, G or 1 + L)
        own = self.places(len(batch), queries[0].device)
        temperature = at.temperature
        # The factor keeps the gradient's size when the temperature is changed (algorithm 1).
        loss = 2 * temperature * torch.stack([F.cross_entropy(one / temperature, own) for one in logits]).sum()
        if self.queue is not None:
            self.queue.observe(torch.stack(keys, dim=1).flatten(0, 1))  # image by image, so that ranks can be joined
        if at.logged:
            self.signs = {"batch_accuracy": torch.stack([one.argmax(1) == own for one in logits]).double().mean()}
        return {"mocov3": loss}

    def similarities(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Cosines of queries (B, E) with the batch's keys, (B, G), or with their own and the queue's, (B, 1 + L)."""
        if self.queue is None:
            return cosines(queries, ranks.gather(keys))
        return self.queue.similarities(queries, keys)

    def places(self, images: int, device: torch.device) -> Tensor:
        """(B,) int64, where each query's own key stands."""
        if self.queue is not None:
            return torch.zeros(images, dtype=torch.int64, device=device)
        return torch.arange(images, device=device) + ranks.rank() * images

    def after_update(self, at: At) -> None:
        if self.queue is not None:
            self.queue.update()
