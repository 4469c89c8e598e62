"""Token-wise contrastive language-image learning (FILIP, arXiv 2111.07783).

Shapes: B pairs on this rank, G pairs on all ranks, N patches, T tokens of a caption, E shared width.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from harmony import ranks
from harmony.data.batch import Batch
from harmony.data.views import ViewConfig
from harmony.models.towers import Towers
from harmony.objectives.base import Encoded, ImageRequest, Objective, ObjectiveConfig, Request, TextRequest
from harmony.objectives.targets import cosines, unit
from harmony.schedules import At

TILE = 2**26
"""Cosines of single tokens held at a time. It sets the memory and changes no result."""


class Filip(Objective):
    """Symmetric InfoNCE, where an image is as similar to a caption as its patches are to their best words.

    The class token has no part in it, and nothing here trains its embedding, by which zero_shot and retrieval measure a
    model (the paper measures by tokens): a recipe adds `clip` for that, which reads the same passes. Nor are the tokens
    thinned out before they are gathered, as the paper does to save memory; they are compared in parts instead.
    """

    class Config(ObjectiveConfig):
        """Settings of the token-wise objective."""

        view: Annotated[str, Field(description="the view whose first crop meets the caption")] = "global"
        initial_scale: Annotated[float, Field(gt=0, description="factor of the similarities at the start")] = 1 / 0.07
        max_scale: Annotated[float, Field(gt=0, description="its upper bound")] = 100.0

    compares_images: ClassVar[bool] = True
    config: Config

    def __init__(self, config: Config, towers: Towers, views: Mapping[str, ViewConfig]) -> None:
        super().__init__(config, towers, views)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(config.initial_scale)))
        self._bound()
        self.image = ImageRequest(config.view, crops=(0,))
        self.text = TextRequest()

    def requests(self) -> Sequence[Request]:
        return [self.image, self.text]

    def forward(self, batch: Batch, encoded: Encoded, at: At) -> dict[str, Tensor]:
        text = encoded.text(self.text)
        patches = unit(encoded.image(self.image).crop(0).embed_patches())  # (B, N, E)
        words, counted = unit(text.embed_words()), text.counted  # (B, T, E), (B, T)
        every_patch, (every_word, every_counted) = ranks.gather(patches), gather_words(words, counted)
        to_text = late_interaction(patches, None, every_word, every_counted)
        to_image = late_interaction(words, counted, every_patch, None)
        own = torch.arange(len(words), device=words.device) + ranks.rank() * len(words)
        scale = self.logit_scale.exp()
        loss = (F.cross_entropy(scale * to_text, own) + F.cross_entropy(scale * to_image, own)) / 2
        if at.logged:
            accuracy = (to_text.argmax(1) == own).double().mean()
            self.signs = {"temperature": 1 / scale.detach(), "batch_accuracy": accuracy}
        return {"filip": loss}

    def _bound(self) -> None:
        self.logit_scale.data.clamp_(max=math.log(self.config.max_scale))  # not its use, as in clip

    def after_update(self, at: At) -> None:
        self._bound()


def late_interaction(own: Tensor, own_counted: Tensor | None, others: Tensor, others_counted: Tensor | None) -> Tensor:
    """Mean over the own tokens of the largest cosine with any token of another (equations 4 and 5).

    Args:
        own: (B, n, E) of unit length.
        own_counted: (B, n) bool, tokens that count; all of them when None.
        others: (G, m, E) of unit length.
        others_counted: (G, m) bool, likewise.

    Returns:
        (B, G).
    """
    share = own.new_ones(own.shape[:2]) if own_counted is None else own_counted.to(own.dtype)
    share = share / share.sum(1, keepdim=True)
    at_once = max(1, TILE // (own.shape[0] * own.shape[1] * others.shape[1]))
    parts = []
    for first in range(0, len(others), at_once):
        some = others[first : first + at_once]
        cosine = cosines(own.flatten(0, 1), some.flatten(0, 1)).view(*own.shape[:2], *some.shape[:2])  # (B, n, g, m)
        if others_counted is not None:
            cosine = cosine.masked_fill(~others_counted[first : first + at_once], -math.inf)
        # `max` keeps for backward where each maximum lies, and none of the cosines.
        parts.append(torch.einsum("bng,bn->bg", cosine.max(dim=3).values, share))
    return torch.cat(parts, dim=1)


def gather_words(words: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, E) and (B, T) of every rank, padded to the longest caption of all: (G, T', E) and (G, T')."""
    if ranks.count() == 1:
        return words, counted
    longest = int(ranks.maximum(torch.tensor(words.shape[1], device=words.device)))
    missing = longest - words.shape[1]
    every = ranks.gather(F.pad(counted, (0, missing)).to(torch.uint8))
    return ranks.gather(F.pad(words, (0, 0, 0, missing))), every.bool()
