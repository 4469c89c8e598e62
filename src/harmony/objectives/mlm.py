"""Masked language modelling on captions (BERT, arXiv 1810.04805, as Harmony, arXiv 2405.14239, uses it).

Shapes: B captions, T words, M masked words in all.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from harmony import ranks
from harmony.data.batch import Batch
from harmony.data.masks import MaskSampler, RandomWords
from harmony.data.views import ViewConfig
from harmony.errors import UserError
from harmony.models.decoders import WordDecoder
from harmony.models.towers import Towers
from harmony.objectives.base import Encoded, Objective, ObjectiveConfig, Request, TextRequest
from harmony.objectives.targets import full_precision
from harmony.schedules import At, Schedule, Share

Direction = Annotated[
    Literal["bidirectional", "causal"],
    Field(description="what a masked word may see; causal, as published, hides the words after it (audit C7)"),
]


class WordDecoderConfig(BaseModel):
    """Sizes of the word decoder; its width is the text tower's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: Annotated[int, Field(ge=1, description="number of blocks")] = 1
    heads: Annotated[int | None, Field(ge=1, description="attention heads; the text tower's if null")] = None
    activation: Annotated[Literal["gelu", "quick_gelu"], Field(description="activation of the MLPs")] = "gelu"
    init: Annotated[
        Literal["scaled", "default"],
        Field(description="first weights: scaled as the text tower's, or PyTorch's own, as published (audit C8)"),
    ] = "scaled"


class Mlm(Objective):
    """Hidden words are named from the words around them."""

    class Config(ObjectiveConfig):
        """Settings of masked language modelling."""

        share: Annotated[Share, Field(description="share of the words that is hidden")] = Schedule.constant(0.2)
        attention: Direction = "bidirectional"
        decoder: WordDecoderConfig = WordDecoderConfig()

    config: Config

    def __init__(self, config: Config, towers: Towers, views: Mapping[str, ViewConfig]) -> None:
        super().__init__(config, towers, views)
        if towers.text is None:
            raise UserError("objective mlm reads captions, but model.text is null; give the text tower's sizes")
        decoder = config.decoder
        heads = decoder.heads or towers.text.heads
        if towers.text.width % heads:
            raise UserError(
                f"objectives.mlm.decoder.heads {heads} does not divide the text tower's width {towers.text.width}; "
                "set it to null for the tower's own"
            )
        self.decoder = WordDecoder(towers.text.width, heads, decoder.layers, decoder.activation, decoder.init)
        self.student = TextRequest(replace="words", attention=config.attention)

    def masks(self) -> Mapping[str, MaskSampler]:
        return {"words": RandomWords(stream="caption", share=self.config.share)}

    def requests(self) -> Sequence[Request]:
        return [self.student]

    def forward(self, batch: Batch, encoded: Encoded, at: At) -> dict[str, Tensor]:
        reading = encoded.text(self.student)
        hidden = batch.masks["words"]
        words = batch.captions["caption"].flatten()[hidden.index]  # (M,)
        scores = full_precision(self.decoder(reading.tokens, reading.end, hidden.index, self.config.attention))
        # Ranks hide different numbers of words; dividing by their mean number makes the mean over ranks the joint mean.
        number = ranks.mean(scores.new_full((), len(words))).clamp(min=1 / ranks.count())
        if at.logged:
            self.signs = {"accuracy": (scores.argmax(-1) == words).to(scores.dtype).sum() / max(len(words), 1)}
        return {"mlm": F.cross_entropy(scores, words, reduction="sum") / number}
