"""Crops of one image find each other among those of all others (SimCLR, arXiv 2002.05709).

Shapes: V crops, B images on this rank, A = B * V crops on this rank, G crops on all ranks, E width of the projection.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from harmony import ranks
from harmony.data.batch import Batch
from harmony.data.views import ViewConfig
from harmony.errors import UserError
from harmony.models.projectors import ProjectorConfig, projector
from harmony.models.towers import Towers
from harmony.objectives.base import Encoded, ImageRequest, Objective, ObjectiveConfig, Request
from harmony.objectives.targets import cosines, unit
from harmony.schedules import At, Positive, Schedule


class Simclr(Objective):
    """NT-Xent between the crops of all ranks (equation 1)."""

    class Config(ObjectiveConfig):
        """Settings of the contrast between crops."""

        view: Annotated[str, Field(description="the view whose crops are compared, two or more an image")] = "global"
        head: Annotated[ProjectorConfig, Field(description="sizes of the projector")] = ProjectorConfig()
        temperature: Annotated[Positive, Field(description="temperature of the similarities")] = Schedule.constant(0.1)
        normed: Annotated[
            Literal["together", "apart"],
            Field(
                description="what the projector's batch normalisation sees: the crops of all images as one batch, as "
                "in SimCLR's code, or one crop of every image at a time, as in SLIP's (arXiv 2112.12750)"
            ),
        ] = "together"

    compares_images: ClassVar[bool] = True
    config: Config

    def __init__(self, config: Config, towers: Towers, views: Mapping[str, ViewConfig]) -> None:
        super().__init__(config, towers, views)
        if config.view in views and views[config.view].count == 1:
            raise UserError(
                f"objective {type(self).__name__.lower()} compares different crops of an image, and there is one; set "
                f"views.{config.view}.count=2"
            )
        self.head = projector(towers.image.width, config.head)
        self.student = ImageRequest(config.view, pooled=True)

    def requests(self) -> Sequence[Request]:
        return [self.student]

    def identities(self, batch: Batch) -> Tensor:
        """(B,) int64: images with the same number belong together. Here each is alike to itself alone."""
        return torch.arange(len(batch), device=batch.chance.keys.device) + ranks.rank() * len(batch)

    def forward(self, batch: Batch, encoded: Encoded, at: At) -> dict[str, Tensor]:
        seen = encoded.image(self.student).cls  # (V, B, D)
        if self.config.normed == "apart":
            projected = torch.stack([self.head(crop) for crop in seen], dim=1)  # (B, V, E)
        else:
            projected = self.head(seen.transpose(0, 1).flatten(0, 1)).unflatten(0, (-1, len(seen)))
        projected = unit(projected.flatten(0, 1))  # (A, E), image by image, so that ranks can be joined
        identity = self.identities(batch).repeat_interleave(len(seen))
        every = ranks.gather(projected)
        place = torch.arange(len(every), device=every.device)
        own = place[ranks.rank() * len(projected) :][: len(projected)]
        itself = own[:, None] == place  # (A, G)
        alike = (identity[:, None] == ranks.gather(identity)) & ~itself
        similarity = cosines(projected, every)
        log_share = (similarity / at.temperature).masked_fill(itself, float("-inf")).log_softmax(1)
        # With several positives their mean is outside of the logarithm (SupCon, arXiv 2004.11362, equation 2).
        loss = -((log_share.masked_fill(itself, 0) * alike).sum(1) / alike.sum(1)).mean()
        if at.logged:
            self.signs = _signs(similarity.detach(), itself, alike)
        return {"simclr": loss}


def _signs(similarity: Tensor, itself: Tensor, alike: Tensor) -> dict[str, Tensor]:
    """From cosines (A, G) and which crop is itself, and which belongs to it.

    Returns:
        batch_accuracy: share of crops whose nearest other crop belongs to it.
        positive_cosine, negative_cosine: mean cosine with those that belong, and with those that do not; when all
            look alike both are 1.
    """
    nearest = similarity.masked_fill(itself, -2).argmax(1, keepdim=True)
    unlike = ~(alike | itself)
    return {
        "batch_accuracy": alike.gather(1, nearest).to(similarity.dtype).mean(),
        "positive_cosine": (similarity * alike).sum() / alike.sum(),
        "negative_cosine": (similarity * unlike).sum() / unlike.sum().clamp(min=1),
    }
