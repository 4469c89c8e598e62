"""Detail from removed patches (DetailCLIP, arXiv 2409.06809).

Shapes: V crops, B images, N patches, R removed ones, M = V * B * R, D width, K prototypes, P values of a patch.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from harmony.data.batch import Batch
from harmony.data.masks import check_share_removed, kept_patches
from harmony.data.views import ViewConfig
from harmony.errors import UserError
from harmony.models.decoders import PixelDecoder
from harmony.models.heads import HeadConfig
from harmony.models.towers import Towers
from harmony.objectives.base import Encoded, GuidedMask, ImageRequest, Objective, Request
from harmony.objectives.mae import pixels_of_removed, places_removed
from harmony.objectives.prototypes import PrototypeConfig, PrototypeObjective
from harmony.objectives.targets import full_precision, signs_of_collapse
from harmony.schedules import At, Positive, Schedule

MASK = "attended"
"""The mask that this objective draws and others may use."""


class DetailDecoderConfig(BaseModel):
    """Sizes of the decoder, which is as wide as the encoder, as its tokens meet the teacher's in one head."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    depth: Annotated[int, Field(ge=1, description="number of blocks")] = 1
    heads: Annotated[int, Field(ge=1, description="attention heads")] = 12


class DetailClip(PrototypeObjective):
    """The student encodes the patches that the teacher's class token attends to most; a decoder fills in the others.

    At every removed patch the decoder's token predicts two things: what the teacher makes of the patch, as in iBOT, and
    its pixels, as in MAE. The method's two other losses are objectives of their own on the same pass: clip and dino
    with `keep: attended`.

    Attentive removal is that of arXiv 2212.08653: the attention is the mean over all blocks and heads, and squares of
    patches go together.
    """

    class Config(PrototypeConfig):
        """Settings of the objective."""

        view: Annotated[str, Field(description="the view whose patches are removed, all crops of it")] = "global"
        removed: Annotated[float, Field(gt=0, lt=1, description="share of the patches that is removed")] = 0.5
        side: Annotated[int, Field(ge=1, description="patches a side of the squares that are removed as one")] = 1
        decoder: DetailDecoderConfig = DetailDecoderConfig()
        head: Annotated[
            HeadConfig | str, Field(description="a head of its own, or the objective that lends its head")
        ] = HeadConfig()
        teacher_temperature: Annotated[Positive, Field(description="temperature of the targets")] = Schedule.parse(
            {"linear": {"from": 0.04, "to": 0.07, "over": "1 epoch"}}
        )
        normalise_targets: Annotated[bool, Field(description="whether each patch is brought to mean 0, variance 1")] = (
            True
        )

    config: Config

    def __init__(self, config: Config, towers: Towers, views: Mapping[str, ViewConfig]) -> None:
        super().__init__(config, towers, views)
        tower, grid = towers.image, towers.image.grid(views[config.view].size)
        self.patch = tower.patch
        if grid[0] % config.side:
            raise UserError(
                f"objectives.detailclip.side {config.side} does not divide the {grid[0]} patches a side of view "
                f"{config.view!r}; set it to 1, or give the view another size"
            )
        squares = (grid[0] // config.side) * (grid[1] // config.side)
        check_share_removed("objectives.detailclip.removed", config.removed, squares, config.view, "squares")
        if tower.width % config.decoder.heads or tower.width % 4:
            raise UserError(
                f"objectives.detailclip.decoder is as wide as the image tower, and {tower.width} is not a multiple of "
                f"its {config.decoder.heads} heads and of 4; change decoder.heads or model.image.width"
            )
        sizes = config.decoder
        self.decoder = PixelDecoder(
            tower.width, grid, tower.patch, tower.width, sizes.depth, sizes.heads, "sine_cosine"
        )
        if isinstance(config.head, HeadConfig):
            self.own_head(tower.width, config.head)
        self.guide = GuidedMask(config.view, kept_patches(squares, config.removed) * config.side**2, grid, config.side)
        self.student = ImageRequest(config.view, keep=MASK)

    def borrow(self, others: Mapping[str, Objective]) -> None:
        if isinstance(self.config.head, str):
            self.borrow_head(self.config.head, others)

    def guided_masks(self) -> Mapping[str, GuidedMask]:
        return {MASK: self.guide}

    def requests(self) -> Sequence[Request]:
        return [self.guide.request, self.student]

    def forward(self, batch: Batch, encoded: Encoded, at: At) -> dict[str, Tensor]:
        head, teacher_head = self.heads()
        mask, seen = batch.masks[MASK], encoded.image(self.student)
        assert mask.kept is not None
        kept, removed = mask.kept.flatten(0, 1), places_removed(mask)
        features = self.decoder.features(seen.tokens.flatten(0, 1), seen.prefix, kept, removed)  # (V * B, R, D)
        painted = full_precision(self.decoder.pixels(features))
        pixels = pixels_of_removed(
            batch.images[self.config.view].flatten(0, 1), self.patch, mask, self.config.normalise_targets
        )
        log_student = self.log_predictions(head(features.flatten(0, 1)), at)
        with torch.no_grad():
            bottleneck = teacher_head.bottleneck(encoded.image(self.guide.request).patches.flatten(0, 2))
            scores = full_precision(teacher_head.prototypes(bottleneck[mask.index]))
            targets = self.targets(scores, at.teacher_temperature)  # (M, K)
            # As in iBOT the centre is that of all patches: the last layer is linear, so it is the score of the mean.
            mean = full_precision(teacher_head.prototypes(bottleneck.mean(0)))
            self.centre.observe_mean(mean, len(bottleneck))
        cross_entropy = -(targets * log_student).sum(-1).mean()
        if at.logged:
            self.signs = signs_of_collapse(targets, cross_entropy)
        return {"patches": cross_entropy, "pixels": (painted - pixels).square().mean()}
