"""Detail from removed patches (DetailCLIP, arXiv 2409.06809).

Shapes: V crops, B images, N patches, R removed ones, M = V * B * R, D width, K prototypes, P values of a patch.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from harmony.data.batch import Batch
from harmony.data.masks import kept_patches
from harmony.data.views import ViewConfig
from harmony.errors import UserError
from harmony.models.decoders import PixelDecoder
from harmony.models.heads import HeadConfig, PrototypeHead
from harmony.models.towers import Towers, slow_copy
from harmony.objectives.base import Encoded, GuidedMask, ImageRequest, Objective, ObjectiveConfig, Request
from harmony.objectives.mae import pixels_of_removed, places_removed
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

MASK = "attended"
"""The mask that this objective draws and others may use."""


class DetailDecoderConfig(BaseModel):
    """Sizes of the decoder, which is as wide as the encoder, as its tokens meet the teacher's in one head."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    depth: Annotated[int, Field(ge=1, description="number of blocks")] = 1
    heads: Annotated[int, Field(ge=1, description="attention heads")] = 12


class DetailClip(Objective):
    """The student encodes the patches that the teacher's class token attends to most; a decoder fills in the others.

    At every removed patch the decoder's token predicts two things: what the teacher makes of the patch, as in iBOT, and
    its pixels, as in MAE. The method's two other losses are objectives of their own on the same pass: clip and dino
    with `keep: attended`.

    The attention is that of the teacher's last block, where the attentive removal it builds on (arXiv 2212.08653) takes
    the mean over all blocks. The depth of the decoder is our choice.
    """

    class Config(ObjectiveConfig):
        """Settings of the objective."""

        view: Annotated[str, Field(description="the view whose patches are removed, all crops of it")] = "global"
        removed: Annotated[float, Field(gt=0, lt=1, description="share of the patches that is removed")] = 0.5
        decoder: DetailDecoderConfig = DetailDecoderConfig()
        head: Annotated[HeadConfig, Field(description="sizes of the prototype head")] = HeadConfig()
        student_temperature: Annotated[Positive, Field(description="temperature of the student's softmax")] = (
            Schedule.constant(0.1)
        )
        teacher_temperature: Annotated[Positive, Field(description="temperature of the targets")] = Schedule.parse(
            {"linear": {"from": 0.04, "to": 0.07, "over": "1 epoch"}}
        )
        centring: Centring = "momentum"
        centre_momentum: Momentum = 0.9
        freeze_prototypes: Annotated[
            DurationField, Field(description="how long the last layer of the head stays as it is")
        ] = Duration(amount=1, unit="epochs")
        normalise_targets: Annotated[bool, Field(description="whether each patch is brought to mean 0, variance 1")] = (
            True
        )

    config: Config

    def __init__(self, config: Config, towers: Towers, views: Mapping[str, ViewConfig]) -> None:
        super().__init__(config, towers, views)
        tower, grid = towers.image, towers.image.grid(views[config.view].size)
        self.patch = tower.patch
        self.kept = kept_patches(grid[0] * grid[1], config.removed)
        if not 0 < self.kept < grid[0] * grid[1]:
            raise UserError(
                f"objectives.detailclip.removed {config.removed:g} keeps {self.kept} of the {grid[0] * grid[1]} "
                f"patches of view {config.view!r}; it must keep some and remove some"
            )
        if tower.width % config.decoder.heads or tower.width % 4:
            raise UserError(
                f"objectives.detailclip.decoder is as wide as the image tower, and {tower.width} is not a multiple of "
                f"its {config.decoder.heads} heads and of 4; change decoder.heads or model.image.width"
            )
        sizes = config.decoder
        self.decoder = PixelDecoder(
            tower.width, grid, tower.patch, tower.width, sizes.depth, sizes.heads, "sine_cosine"
        )
        self.head = PrototypeHead(tower.width, config.head)
        self.teacher_head = slow_copy(self.head)
        self.centre = Centre(config.head.prototypes, config.centre_momentum)
        self.guide = GuidedMask(config.view, self.kept)
        self.student = ImageRequest(config.view, keep=MASK)

    def guided_masks(self) -> Mapping[str, GuidedMask]:
        return {MASK: self.guide}

    def requests(self) -> Sequence[Request]:
        return [self.guide.request, self.student]

    def slow_twins(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        return [(self.head, self.teacher_head)]

    def forward(self, batch: Batch, encoded: Encoded, at: At) -> dict[str, Tensor]:
        mask, seen = batch.masks[MASK], encoded.image(self.student)
        assert mask.kept is not None
        kept, removed = mask.kept.flatten(0, 1), places_removed(mask)
        features = self.decoder.features(seen.tokens.flatten(0, 1), seen.prefix, kept, removed)  # (V * B, R, D)
        painted = full_precision(self.decoder.pixels(features))
        pixels = pixels_of_removed(
            batch.images[self.config.view].flatten(0, 1), self.patch, mask, self.config.normalise_targets
        )
        log_student = (full_precision(self.head(features.flatten(0, 1))) / at.student_temperature).log_softmax(dim=-1)
        targets = self.targets(encoded.image(self.guide.request).patches.flatten(0, 2), mask.index, at)  # (M, K)
        cross_entropy = -(targets * log_student).sum(-1).mean()
        if at.logged:
            self.signs = signs_of_collapse(targets, cross_entropy)
        return {"patches": cross_entropy, "pixels": (painted - pixels).square().mean()}

    @torch.no_grad()
    def targets(self, patches: Tensor, index: Tensor, at: At) -> Tensor:
        """(V * B * N, D) the teacher's patches -> (M, K) target distributions of the removed ones."""
        bottleneck = self.teacher_head.bottleneck(patches)
        # As in iBOT the centre is that of all patches: the last layer is linear, so it is the score of the mean.
        mean = full_precision(self.teacher_head.prototypes(bottleneck.mean(0)))
        scores = full_precision(self.teacher_head.prototypes(bottleneck[index]))
        if self.config.centring == "sinkhorn_knopp":
            return sinkhorn_knopp(scores, at.teacher_temperature)
        targets = centred(scores, self.centre, at.teacher_temperature)
        self.centre.observe_mean(mean, len(bottleneck))
        return targets

    def before_update(self, at: At) -> None:
        if at.clock.step < self.config.freeze_prototypes.steps(at.clock):
            self.head.prototypes.direction.grad = None

    def after_update(self, at: At) -> None:
        self.centre.update()

    def after_skip(self) -> None:
        self.centre.forget()
