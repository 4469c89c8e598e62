"""Features spread over the sphere (KoLeo, Sablayrolles et al., arXiv 1806.03198, as in DINOv2, arXiv 2304.07193).

Shapes: V crops, B images on this rank, D width.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from harmony.data.batch import Batch
from harmony.data.views import ViewConfig
from harmony.models.towers import Towers
from harmony.objectives.base import Encoded, ImageRequest, Objective, ObjectiveConfig, Request
from harmony.objectives.targets import cosines, full_precision
from harmony.schedules import At

_SMALLEST = 1e-8
"""Added to squared distances, so that equal images have a finite loss and gradient."""


class Koleo(Objective):
    """The student's class tokens keep away from their nearest neighbours: the Kozachenko-Leonenko estimate of entropy.

    A token's neighbours are those of the same crop among the images that this process encodes at a time: not those of
    other ranks or of other accumulated parts, as published (DINOv2, appendix B), so the loss depends on how a batch is
    spread. DINOv2 names the first large crop only, and its code adds both up; here crops are averaged.
    """

    class Config(ObjectiveConfig):
        """Settings of the spreading objective."""

        view: Annotated[str, Field(description="the view whose crops are spread, each crop apart")] = "global"
        mask: Annotated[
            str | None, Field(description="a mask (drawn by another objective) on them, as dino's, to share its pass")
        ] = None

    compares_images: ClassVar[bool] = True
    within_rank: ClassVar[bool] = True
    config: Config

    def __init__(self, config: Config, towers: Towers, views: Mapping[str, ViewConfig]) -> None:
        super().__init__(config, towers, views)
        self.student = ImageRequest(config.view, replace=config.mask, pooled=True)

    def requests(self) -> Sequence[Request]:
        return [self.student]

    def forward(self, batch: Batch, encoded: Encoded, at: At) -> dict[str, Tensor]:
        tokens = full_precision(encoded.image(self.student).cls)  # (V, B, D)
        gaps = torch.stack([squared_gaps(F.normalize(crop, dim=-1)) for crop in tokens])  # (V, B)
        if at.logged:
            self.signs = {"nearest": gaps.detach().sqrt().mean()}
        return {"koleo": -0.5 * gaps.log().mean()}


def squared_gaps(features: Tensor) -> Tensor:
    """(B, D) unit vectors -> (B), squared distances to the nearest neighbour; 1, a loss of 0, for one alone."""
    if len(features) < 2:
        return 1 + 0 * features.sum(-1)
    with torch.no_grad():
        likeness = cosines(features, features).fill_diagonal_(-2)
        nearest = likeness.argmax(dim=1)
    return (features - features[nearest]).square().sum(-1) + _SMALLEST
