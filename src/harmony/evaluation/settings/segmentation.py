"""Settings of semantic segmentation."""

from typing import Annotated, Literal

from pydantic import Field

from harmony.data.ranges import Ascending
from harmony.evaluation.settings.base import FitConfig

_Scale = Annotated[float, Field(gt=0, le=8)]


class SegmentationConfig(FitConfig):
    """A class for every pixel."""

    head: Literal["linear", "multi_linear", "upernet", "zero_shot"] = Field(
        "linear",
        description="what turns patches into classes: linear on the last block of the frozen encoder, multi_linear on "
        "its last four, upernet trained together with the encoder, or zero_shot, the text tower's reading of the names",
    )
    short_side: Annotated[int, Field(ge=1)] | Literal["size"] | None = Field(
        "size",
        description="images are resized so that their shorter side has this many px; size is the encoder's input, "
        "null keeps them as they are",
    )
    scale: Annotated[tuple[_Scale, _Scale], Ascending] = Field(
        (0.5, 2.0), description="range of the random factor that a training image is resized by before it is cropped"
    )
    most_of_one_class: float = Field(
        0.75,
        gt=0,
        le=1,
        description="a training crop with a larger share of one class is drawn anew, at most ten times",
    )
    flip: float = Field(0.5, ge=0, le=1, description="probability that a training crop is mirrored left to right")
    photometric: bool = Field(True, description="change brightness, contrast, saturation and hue of training crops")
    stride: Annotated[float, Field(gt=0, le=1)] = Field(
        2 / 3, description="step of the sliding window as a share of its side, rounded to whole patches"
    )
    test_scales: tuple[_Scale, ...] = Field(
        (1.0,),
        min_length=1,
        max_length=16,
        description="sizes that a measured image is predicted at, relative to short_side; probabilities are averaged",
    )
    test_flip: bool = Field(False, description="predict the mirrored image too, and average")
    layer_decay: float = Field(
        0.65, gt=0, le=1, description="upernet: factor of the learning rate from one block to the one below"
    )
    backbone_lr_scale: float = Field(
        0.1, gt=0, le=1, description="upernet: learning rate of the encoder's last block, relative to the head's"
    )
    drop_path: float = Field(0.1, ge=0, lt=1, description="upernet: stochastic depth rate of the last block")
    channels: int | None = Field(
        None, ge=1, le=8192, description="upernet: width of the head; the encoder's, at most 1024, if null"
    )
    templates: str = Field(
        "plain", min_length=1, description="zero_shot: templates class names are put in, as for the task zero_shot"
    )

    epochs: float = Field(30, gt=0, le=1e6, description="passes over the training data; `steps` overrides it")
    train_batch_size: int = Field(16, ge=1, le=65536, description="crops an update sees, over all processes")
    weight_decay: float = Field(0.01, ge=0, lt=10, description="decoupled weight decay; never on norms and biases")
