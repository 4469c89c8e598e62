"""Prediction of features of hidden blocks (I-JEPA, arXiv 2301.08243).

Shapes: V crops, B images, N patches, C context patches, T target blocks of L patches, D width.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from harmony.data.batch import Batch
from harmony.data.masks import MaskSampler, MultiBlockMasks, PatchMasks
from harmony.data.views import ViewConfig
from harmony.errors import UserError
from harmony.models.predictors import BlockPredictor
from harmony.models.towers import Towers
from harmony.objectives.base import Encoded, ImageRequest, Objective, ObjectiveConfig, Request
from harmony.objectives.targets import full_precision
from harmony.schedules import At


class PredictorConfig(BaseModel):
    """Sizes of the predictor."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: Annotated[int, Field(ge=4, multiple_of=4, description="token width")] = 384
    depth: Annotated[int, Field(ge=1, description="number of blocks")] = 6
    heads: Annotated[int, Field(ge=1, description="attention heads")] = 12

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class Ijepa(Objective):
    """From a part of an image, the student predicts what the teacher makes of blocks elsewhere in the whole of it.

    The paper's encoder has no class token and is used by the mean of its patches. The towers here have one: it enters
    the predictor with the context, as in MAE, so that it is trained to hold what helps to predict.
    """

    class Config(ObjectiveConfig):
        """Settings of the prediction objective."""

        view: Annotated[str, Field(description="the view whose blocks are predicted, all crops of it")] = "global"
        masks: Annotated[PatchMasks, Field(description="context and targets: multi_block and its settings")] = (
            MultiBlockMasks()
        )
        predictor: PredictorConfig = PredictorConfig()
        loss: Annotated[
            Literal["smooth_l1", "squared"],
            Field(description="of each channel: smooth L1 as in the published code, or squared as in the paper's text"),
        ] = "smooth_l1"

    config: Config

    def __init__(self, config: Config, towers: Towers, views: Mapping[str, ViewConfig]) -> None:
        super().__init__(config, towers, views)
        if not isinstance(config.masks, MultiBlockMasks):
            raise UserError(
                f"objective ijepa predicts blocks, and a mask of kind {config.masks.kind!r} has none; "
                "set its masks to multi_block"
            )
        self.mask = config.masks.kind
        self.sampler = config.masks.on(config.view)
        grid = towers.image.grid(views[config.view].size)
        self.sampler.check(grid)
        sizes = config.predictor
        self.predictor = BlockPredictor(towers.image.width, grid, sizes.width, sizes.depth, sizes.heads)
        self.student = ImageRequest(config.view, keep=self.mask)
        self.teacher = ImageRequest(config.view, model="teacher")

    def masks(self) -> Mapping[str, MaskSampler]:
        return {self.mask: self.sampler}

    def requests(self) -> Sequence[Request]:
        return [self.teacher, self.student]

    def forward(self, batch: Batch, encoded: Encoded, at: At) -> dict[str, Tensor]:
        mask, seen = batch.masks[self.mask], encoded.image(self.student)
        assert mask.kept is not None and mask.blocks is not None
        places = (mask.kept.flatten(0, 1), mask.blocks.flatten(0, 1))
        predicted = full_precision(self.predictor(seen.tokens.flatten(0, 1), seen.prefix, *places))
        whole = self.features(encoded.image(self.teacher).patches)
        targets = taken(whole, mask.blocks)
        if at.logged:
            # Over the images at each place: features that tell the place alone would look alive over all patches.
            self.signs = {"target_spread": whole.detach().var(dim=1, correction=0).mean().sqrt()}
        loss = F.smooth_l1_loss if self.config.loss == "smooth_l1" else F.mse_loss
        return {"ijepa": loss(predicted, targets)}

    @torch.no_grad()
    def features(self, patches: Tensor) -> Tensor:
        """(V, B, N, D) the teacher's patches -> the same, each of mean 0 and variance 1."""
        return F.layer_norm(full_precision(patches), patches.shape[-1:])


def taken(features: Tensor, blocks: Tensor) -> Tensor:
    """(V, B, N, D) and places (V, B, T, L) -> (V * B, T, L, D), the features of the blocks."""
    width = features.shape[-1]
    places = blocks.flatten(2)[..., None].expand(*features.shape[:2], -1, width)
    return features.gather(2, places).unflatten(2, blocks.shape[2:]).flatten(0, 1)
