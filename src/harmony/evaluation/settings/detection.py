"""Settings of detection."""

from typing import Annotated, Literal

from pydantic import Field

from harmony.data.ranges import Ascending, PositiveRange
from harmony.evaluation.settings.base import FitConfig
from harmony.schedules import Duration, DurationField

_Share = Annotated[float, Field(gt=0, le=2)]


class DetectionConfig(FitConfig):
    """Boxes, and masks where the data have them, around things (ViTDet, arXiv 2203.16527)."""

    epochs: float = Field(100, gt=0, le=1e6, description="passes over the training data; `steps` overrides it")
    train_batch_size: int = Field(16, ge=1, le=65536, description="images an update sees, over all processes")
    lr: float = Field(2e-4, gt=0, lt=10, description="peak learning rate of AdamW, for the batch as it is")
    warmup: DurationField = Field(
        Duration(amount=5, unit="%"), description="how long the learning rate rises linearly from zero"
    )
    weight_decay: float = Field(0.1, ge=0, lt=10, description="decoupled weight decay; never on norms and biases")
    layer_decay: float = Field(
        0.7, gt=0, le=1, description="factor of the learning rate from each block of the encoder to the one below it"
    )
    drop_path: float = Field(0.1, ge=0, lt=1, description="stochastic depth rate of the encoder's last block")
    head: Literal["mask_rcnn", "cascade"] = Field(
        "mask_rcnn", description="one box head, or a cascade of three that ask for IoUs of 0.5, 0.6 and 0.7"
    )
    window: int | None = Field(
        14,
        ge=1,
        le=1024,
        description="side in patches of the windows that all but four blocks attend within; null attends globally",
    )
    channels: int = Field(256, ge=8, le=4096, description="width of the pyramid and of the heads")
    anchors: tuple[_Share, _Share, _Share, _Share, _Share] = Field(
        (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2),
        description="sides of the anchors on the five levels of the pyramid, finest first, as shares of the image size",
    )
    scale: Annotated[
        PositiveRange,
        Ascending,
        Field(description="range of the size a training image is brought to, as a share of the image size"),
    ] = (0.1, 2.0)
    flip: float = Field(0.5, ge=0, le=1, description="probability that a training image is mirrored left to right")
    regions: int = Field(512, ge=8, le=4096, description="regions of an image that the heads learn from in a step")
    proposals: int = Field(1000, ge=10, le=10000, description="regions of an image that are proposed to the box heads")
    detections: int = Field(
        100, ge=1, le=100, description="things found on an image, at most; COCO counts no more than 100"
    )
    min_score: float = Field(0.05, ge=0, lt=1, description="things found with a lower score are left out")
