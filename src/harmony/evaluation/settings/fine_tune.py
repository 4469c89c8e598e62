"""Settings of fine-tuning."""

from typing import Literal

from pydantic import Field, field_validator

from harmony.evaluation.settings.base import FitConfig
from harmony.schedules import Duration, DurationField


class FineTuneConfig(FitConfig):
    """The whole encoder trained as a classifier."""

    epochs: float = Field(50, gt=0, le=1e6, description="passes over the training data; `steps` overrides it")
    lr: float = Field(5e-4, gt=0, lt=10, description="peak learning rate of AdamW at the head, for the batch as it is")
    warmup: DurationField = Field(
        Duration(amount=10, unit="%"), description="how long the learning rate rises linearly from zero"
    )
    layer_decay: float = Field(
        0.65, gt=0, le=1, description="factor of the learning rate from each block to the one before it; 1 for none"
    )
    drop_path: float = Field(
        0.1, ge=0, lt=1, description="stochastic depth: how often the last block is skipped, earlier ones less often"
    )
    labels: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the training images that is learned from, the same in each class and at least one: "
        "0.01, 0.1, 1; a smaller share is part of a larger one",
    )
    pool: Literal["token", "avg"] | None = Field(
        None, description="what the head reads: the class token, or the mean of the patches; the model's own if null"
    )
    mixup: float = Field(0.8, ge=0, le=100, description="alpha of mixup's Beta distribution; 0 for none")
    cutmix: float = Field(1.0, ge=0, le=100, description="alpha of CutMix's Beta distribution; 0 for none")
    mixed: float = Field(1.0, ge=0, le=1, description="share of the batches that are mixed, half of them by each")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="how much of a label is spread over all classes")
    crop_scale: tuple[float, float] = Field(
        (0.08, 1.0), description="smallest and largest share of the image that a training crop covers"
    )
    flip: float = Field(0.5, ge=0, le=1, description="share of the crops that are mirrored")
    randaugment: int | None = Field(9, ge=0, le=30, description="magnitude of RandAugment's two operations; null: none")
    random_erasing: float = Field(0.25, ge=0, le=1, description="share of the crops with a rectangle of noise")
    ema: float | None = Field(
        None, ge=0, lt=1, description="momentum of a moving average of the weights, which is then measured; null: none"
    )

    @field_validator("crop_scale")
    @classmethod
    def _shares(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError("must be two shares, the smaller first, above 0 and at most 1")
        return scale
