"""Masked image modelling with discrete codes of a frozen model's features (BEiT v2, arXiv 2208.06366).

Shapes: V crops, B images, N patches, M masked patches in all, D width of the frozen model, K codes.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from harmony.data.batch import Batch
from harmony.data.masks import BlockMasks, MaskSampler, PatchMasks
from harmony.data.views import ViewConfig
from harmony.errors import UserError, unknown
from harmony.models.towers import Towers
from harmony.models.vision import ImageTower
from harmony.objectives.base import Encoded, ImageRequest, Objective, ObjectiveConfig, Request
from harmony.objectives.codebook import Codebook
from harmony.objectives.targets import full_precision
from harmony.schedules import At


class Beit(Objective):
    """The student names, at each hidden patch, the code of what a frozen model makes of the patch (the paper's L_MIM).

    The paper trains the codes beforehand: an encoder over the image (VQ-KD) whose quantised output a decoder turns into
    the frozen model's features. Here they are k-means of these features themselves, learned beside the student
    (`Codebook`), so that there is no first stage, and codes move a little while they are predicted. The paper's second
    loss, by which the class token helps a shallow decoder (patch aggregation), is left out. The frozen model's features
    are its final tokens, before the projection into a space shared with captions that the paper takes them from.
    """

    class Config(ObjectiveConfig):
        """Settings of the masked-code objective."""

        view: Annotated[str, Field(description="the view whose patches are hidden")] = "global"
        tokenizer: Annotated[str, Field(description="name of the frozen model whose features are made into codes")] = (
            "tokenizer"
        )
        masks: Annotated[PatchMasks, Field(description="its mask: a kind, which is also its name, and settings")] = (
            BlockMasks(ratio=(0.4, 0.4), share=1.0)
        )
        codes: Annotated[int, Field(ge=2, description="K, number of codes")] = 8192
        decay: Annotated[float, Field(ge=0, lt=1, description="share of an old code that is kept in each step")] = 0.99
        dead: Annotated[
            float,
            Field(ge=0, lt=1, description="a code used less than this share of an even use is put onto a hidden patch"),
        ] = 0.01

    config: Config

    def __init__(self, config: Config, towers: Towers, views: Mapping[str, ViewConfig]) -> None:
        super().__init__(config, towers, views)
        self.mask = config.masks.kind
        self.frozen = ImageRequest(config.view, model=config.tokenizer)
        self.student = ImageRequest(config.view, replace=self.mask)
        self.head = nn.Linear(towers.image.width, config.codes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self._patch = towers.image.patch

    def meet(self, frozen: Mapping[str, ImageTower]) -> None:
        name = self.config.tokenizer
        if name not in frozen:
            raise unknown("frozen model in objective beit:", name, frozen)
        if frozen[name].patch != self._patch:
            raise UserError(
                f"objective beit needs a code for each patch of {self._patch} px, but the patches of frozen.{name} are "
                f"{frozen[name].patch} px wide; use models with the same patches"
            )
        self.codebook = Codebook(self.config.codes, frozen[name].width, self.config.decay, self.config.dead)

    def masks(self) -> Mapping[str, MaskSampler]:
        return {self.mask: self.config.masks.on(self.config.view)}

    def requests(self) -> Sequence[Request]:
        return [self.student, self.frozen]

    def forward(self, batch: Batch, encoded: Encoded, at: At) -> dict[str, Tensor]:
        mask = batch.masks[self.mask]
        crops, images, patches = mask.masked.shape
        features = full_precision(encoded.image(self.frozen).patches.flatten(0, 2)[mask.index])
        features = F.normalize(features, dim=-1)  # (M, D)
        codes = self.codebook.nearest(features)
        lots = batch.chance.uniform("beit/lots", crops, patches).transpose(0, 1).flatten()[mask.index]
        self.codebook.observe(features, codes, lots)
        scores = full_precision(self.head(encoded.image(self.student).patches.flatten(0, 2)[mask.index]))  # (M, K)
        cross_entropy = F.cross_entropy(scores, codes, reduction="none")
        loss = (cross_entropy * mask.share(cross_entropy.dtype)).sum() / (crops * images)
        if at.logged:
            even = self.codebook.use / self.codebook.use.sum().clamp(min=1e-12)
            self.signs = {
                "code_use": (-(even * even.clamp(min=1e-12).log()).sum()).exp() / self.config.codes,
                "accuracy": (scores.argmax(1) == codes).to(scores.dtype).sum() / max(len(codes), 1),
            }
        return {"beit": loss}

    def after_update(self, at: At) -> None:
        self.codebook.update()
