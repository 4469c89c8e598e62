"""Self-distillation on masked words (Harmony, arXiv 2405.14239).

Shapes: B captions, T words, M masked words in all, K prototypes.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from harmony.data.batch import Batch
from harmony.data.views import ViewConfig
from harmony.errors import UserError
from harmony.models.encodings import TextEncoding
from harmony.models.heads import HeadConfig
from harmony.models.towers import Towers
from harmony.objectives.base import Encoded, Request, TextRequest
from harmony.objectives.mlm import Direction
from harmony.objectives.prototypes import PrototypeConfig, PrototypeObjective
from harmony.objectives.targets import centred, full_precision, signs_of_collapse
from harmony.schedules import At


class TextDistillation(PrototypeObjective):
    """The student predicts, at each hidden word, what the teacher makes of the word it reads."""

    class Config(PrototypeConfig):
        """Settings of text self-distillation."""

        mask: Annotated[str, Field(description="the mask on the words, drawn by another objective")] = "words"
        attention: Direction = "bidirectional"
        head: Annotated[HeadConfig, Field(description="sizes of the prototype head")] = HeadConfig(
            prototypes=2048, layers=2
        )
        centre_on: Annotated[
            Literal["scores", "probabilities"],
            Field(
                description="what the centre is the mean of: the teacher's scores of the words, or, as published, its "
                "softmax outputs, which centres nothing (audit C4)"
            ),
        ] = "scores"

    config: Config

    def __init__(self, config: Config, towers: Towers, views: Mapping[str, ViewConfig]) -> None:
        super().__init__(config, towers, views)
        if towers.text is None:
            raise UserError("objective text_distillation reads captions, but model.text is null; give its sizes")
        self.own_head(towers.text.width, config.head)
        self.student = TextRequest(replace=config.mask, attention=config.attention)
        self.teacher = TextRequest(model="teacher")

    def requests(self) -> Sequence[Request]:
        return [self.student, self.teacher]

    def forward(self, batch: Batch, encoded: Encoded, at: At) -> dict[str, Tensor]:
        mask = batch.masks[self.config.mask]
        hidden = encoded.text(self.student).tokens.flatten(0, 1)[mask.index]  # (M, D)
        log_student = self.log_predictions(self.head(hidden), at)
        with torch.no_grad():
            reading = encoded.text(self.teacher)
            scores = full_precision(self.teacher_head(reading.tokens.flatten(0, 1)[mask.index]))
            targets = self.targets(scores, at.teacher_temperature)
            self._observe(reading, at.teacher_temperature)
        cross_entropy = -(targets * log_student).sum(-1)
        loss = (cross_entropy * mask.share(cross_entropy.dtype)).sum() / len(batch)
        if at.logged:
            self.signs = signs_of_collapse(targets, cross_entropy.sum() / max(len(targets), 1))
        return {"text_distillation": loss}

    def _observe(self, reading: TextEncoding, temperature: float) -> None:
        tokens = reading.tokens  # (B, T, D)
        place = torch.arange(tokens.shape[1], device=tokens.device)
        words = (place <= reading.end[:, None]).to(tokens.dtype)[..., None]  # (B, T, 1), without the padding
        if self.config.centre_on == "probabilities":
            means = centred(self.teacher_head(tokens), self.centre, temperature)
            self.centre.observe_mean((means * words).sum((0, 1)) / words.sum(), words.sum())
            return
        # The mean score of the words is the score of their mean bottleneck: the last layer is linear.
        mean = (self.teacher_head.bottleneck(tokens) * words).sum((0, 1)) / words.sum()
        self.centre.observe_mean(full_precision(self.teacher_head.prototypes(mean)), words.sum())
