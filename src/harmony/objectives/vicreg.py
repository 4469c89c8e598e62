"""Crops of one image have one embedding, whose variables vary and are uncorrelated (VICReg, arXiv 2105.04906).

Shapes: B images on this rank, G images on all ranks, E width of the embedding.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from harmony import ranks
from harmony.data.batch import Batch
from harmony.data.views import ViewConfig
from harmony.models.projectors import ProjectorConfig, projector
from harmony.models.towers import Towers
from harmony.objectives.base import Encoded, ImageRequest, Objective, ObjectiveConfig, Request
from harmony.objectives.targets import full_precision
from harmony.schedules import At, NonNegative, Schedule

_EPSILON = 1e-4
"""Added to variances under the root (equation 2)."""


class Vicreg(Objective):
    """Invariance, variance and covariance of two crops' embeddings (equation 6)."""

    class Config(ObjectiveConfig):
        """Settings of the three terms."""

        view: Annotated[str, Field(description="the view whose first two crops are compared")] = "global"
        head: Annotated[ProjectorConfig, Field(description="sizes of the expander")] = ProjectorConfig(
            hidden=8192, output=8192, layers=3
        )
        invariance: Annotated[NonNegative, Field(description="weight of the squared distance of both embeddings")] = (
            Schedule.constant(25.0)
        )
        variance: Annotated[
            NonNegative, Field(description="weight of what is missing to a standard deviation of 1")
        ] = Schedule.constant(25.0)
        covariance: Annotated[NonNegative, Field(description="weight of the squared covariances")] = Schedule.constant(
            1.0
        )

    compares_images: ClassVar[bool] = True
    config: Config

    def __init__(self, config: Config, towers: Towers, views: Mapping[str, ViewConfig]) -> None:
        super().__init__(config, towers, views)
        self.head = projector(towers.image.width, config.head)
        self.student = ImageRequest(config.view, crops=(0, 1), pooled=True)

    def requests(self) -> Sequence[Request]:
        return [self.student]

    def forward(self, batch: Batch, encoded: Encoded, at: At) -> dict[str, Tensor]:
        # Each crop passes the expander by itself, so its norms see one crop of every image.
        embeddings = [full_precision(self.head(seen)) for seen in encoded.image(self.student).cls]
        with torch.autocast(embeddings[0].device.type, enabled=False):
            first, second = (ranks.gather(embedding) for embedding in embeddings)  # (G, E)
            # Averaged over variables too, as the paper's algorithm and code have it; equation 5 adds them up.
            invariance = (first - second).square().mean()
            variance = missing_spread(first) + missing_spread(second)
            covariance = correlation(first) + correlation(second)
        if at.logged:
            self.signs = {
                "invariance": invariance.detach(),
                "variance": variance.detach(),
                "covariance": covariance.detach(),
                "spread": _deviation(first.detach()).mean(),
            }
        return {"vicreg": at.invariance * invariance + at.variance * variance + at.covariance * covariance}


def missing_spread(embedding: Tensor) -> Tensor:
    """How far each variable's standard deviation stays below 1, averaged (equation 1), from (G, E).

    Both crops' terms are added up, as in equation 6; the published code halves each.
    """
    return (1 - _deviation(embedding)).clamp(min=0).mean()


def _deviation(embedding: Tensor) -> Tensor:
    """(E,)."""
    centred = embedding - embedding.mean(0)
    return (centred.square().sum(0) / max(len(embedding) - 1, 1) + _EPSILON).sqrt()


def correlation(embedding: Tensor) -> Tensor:
    """Squared covariances of different variables, added up and divided by their number E (equations 3 and 4)."""
    centred = embedding - embedding.mean(0)
    covariance = centred.T @ centred / max(len(embedding) - 1, 1)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / covariance.shape[0]
