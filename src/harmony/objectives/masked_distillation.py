"""Masked self-distillation (MaskCLIP, arXiv 2208.12262, section 3.2).

Few patches are encoded; a one-block decoder predicts, at the places of the others, what the slow teacher makes of the
whole image. Both are compared as soft codes: distributions over prototypes, of the student's head and of its slow copy.

Shapes: V crops, B images, N patches, K kept patches, R = N - K removed ones, M = V * B * R, D width.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from harmony.data.batch import Batch
from harmony.data.masks import MaskSampler, RandomPatches, check_share_removed
from harmony.data.views import ViewConfig
from harmony.errors import UserError
from harmony.models.decoders import FeatureDecoder
from harmony.models.heads import HeadConfig
from harmony.models.towers import Towers
from harmony.objectives.base import Encoded, ImageRequest, Request
from harmony.objectives.mae import places_removed
from harmony.objectives.prototypes import PrototypeConfig, PrototypeObjective
from harmony.objectives.targets import full_precision, signs_of_collapse
from harmony.schedules import At, Duration, DurationField, Schedule, Share


class FeatureDecoderConfig(BaseModel):
    """Sizes of the decoder; its width is the image tower's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    depth: Annotated[int, Field(ge=1, description="number of blocks")] = 1
    heads: Annotated[int | None, Field(ge=1, description="attention heads; the image tower's if null")] = None


class MaskedDistillation(PrototypeObjective):
    """The decoder predicts, at each removed patch, the soft code that the teacher gives it.

    What keeps the codes from collapsing is here what iBOT (arXiv 2111.07832) does, whose online tokenizer the paper
    follows: they are centred, over the removed patches, and sharpened by the teacher's temperature. The decoder is a
    plain reading of "one layer" too: MAE's, at the encoder's width and with its fixed positions.
    """

    class Config(PrototypeConfig):
        """Settings of the masked self-distillation objective."""

        view: Annotated[str, Field(description="the view whose patches are removed, all crops of it")] = "global"
        mask_ratio: Annotated[Share, Field(description="share of the patches that is removed")] = Schedule.constant(
            0.75
        )
        decoder: FeatureDecoderConfig = FeatureDecoderConfig()
        head: Annotated[HeadConfig, Field(description="sizes of the head that gives codes")] = HeadConfig()
        freeze_prototypes: Annotated[
            DurationField, Field(description="how long the last layer of the head stays as it is")
        ] = Duration(amount=0, unit="epochs")

    config: Config

    def __init__(self, config: Config, towers: Towers, views: Mapping[str, ViewConfig]) -> None:
        super().__init__(config, towers, views)
        rows, columns = towers.image.grid(views[config.view].size)
        for ratio in (config.mask_ratio.start, config.mask_ratio.stop):
            check_share_removed("objectives.masked_distillation.mask_ratio", ratio, rows * columns, config.view)
        width, heads = towers.image.width, config.decoder.heads or towers.image.heads
        if width % heads or width % 4:
            raise UserError(
                f"objectives.masked_distillation.decoder has the image tower's width {width}, which must be a multiple "
                f"of 4 and of its {heads} heads; set decoder.heads to null for the tower's own"
            )
        self.decoder = FeatureDecoder(width, (rows, columns), config.decoder.depth, heads)
        self.own_head(width, config.head)
        self.student = ImageRequest(config.view, keep="masked_distillation")
        self.teacher = ImageRequest(config.view, model="teacher")

    def masks(self) -> Mapping[str, MaskSampler]:
        return {"masked_distillation": RandomPatches(view=self.config.view, ratio=self.config.mask_ratio)}

    def requests(self) -> Sequence[Request]:
        return [self.teacher, self.student]

    def forward(self, batch: Batch, encoded: Encoded, at: At) -> dict[str, Tensor]:
        encoding, mask = encoded.image(self.student), batch.masks["masked_distillation"]
        assert mask.kept is not None
        kept, removed = mask.kept.flatten(0, 1), places_removed(mask)
        predicted = self.decoder(encoding.tokens.flatten(0, 1), encoding.prefix, kept, removed)
        log_student = self.log_predictions(self.head(predicted.flatten(0, 1)), at)  # (M, prototypes)
        with torch.no_grad():
            patches = encoded.image(self.teacher).patches.flatten(0, 2)  # (V * B * N, D)
            slow = full_precision(self.teacher_head(patches[mask.index]))
            targets = self.targets(slow, at.teacher_temperature)
            self.centre.observe(slow)
        loss = -(targets * log_student).sum(-1).mean()
        if at.logged:
            self.signs = signs_of_collapse(targets, loss)
        return {"masked_distillation": loss}
