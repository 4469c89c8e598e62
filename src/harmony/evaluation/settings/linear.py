"""Settings of the linear probe."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from harmony.evaluation.settings.base import FitConfig
from harmony.schedules import Duration, DurationField

Layers = Annotated[int, Field(ge=1, le=4)]
Pooling = Literal["cls", "cls_and_mean"]
Regularisation = Annotated[float, Field(gt=0, le=1e6)]
Factor = Annotated[float, Field(gt=0, le=1000)]


def _listed(value: Any) -> Any:
    """One value where a list of them may stand."""
    return value if isinstance(value, list | tuple) else [value]


def _different(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise ValueError("must have at least one entry")
    if len(set(values)) < len(values):
        raise ValueError("must not have an entry twice")
    return values


class LinearConfig(FitConfig):
    """A linear classifier on frozen features."""

    mode: Literal["lbfgs", "sgd"] = Field(
        "lbfgs",
        description="lbfgs: logistic regression, solved on the features of central crops; sgd: heads trained on "
        "augmented images, as papers do; the settings of training (epochs, lr, ...) are for sgd alone",
    )
    layers: Annotated[tuple[Layers, ...], BeforeValidator(_listed), AfterValidator(_different)] = Field(
        (1, 4), description="tried: how many of the last blocks' class tokens are laid end to end, 1 to 4"
    )
    pooling: Annotated[tuple[Pooling, ...], BeforeValidator(_listed), AfterValidator(_different)] = Field(
        ("cls", "cls_and_mean"), description="tried: class tokens alone, or with the last block's mean patch besides"
    )
    regularisation: Annotated[tuple[Regularisation, ...], BeforeValidator(_listed), AfterValidator(_different)] = Field(
        (1e2, 1e1, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6),
        description="tried by lbfgs: factor of half the squared weights, beside the mean cross-entropy",
    )
    lr_factors: Annotated[tuple[Factor, ...], BeforeValidator(_listed), AfterValidator(_different)] = Field(
        (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 3e-4, 1e-4),
        description="tried by sgd: each head's learning rate is lr times one of these",
    )
    validation_share: float = Field(
        0.1, gt=0, le=0.5, description="share of each class's training images held out to choose a setting on"
    )
    smallest_crop: float = Field(
        0.08, gt=0, le=1, description="sgd: smallest area of a random crop, as a share of the image"
    )
    train_batch_size: int = Field(256, ge=1, le=65536, description="images an update sees, over all processes")
    lr: float = Field(0.1, gt=0, lt=10, description="sgd: learning rate that lr_factors scale, for the batch as it is")
    warmup: DurationField = Field(
        Duration(amount=0, unit="steps"), description="how long the learning rate rises linearly from zero"
    )
    weight_decay: float = Field(0.0, ge=0, lt=10, description="weight decay; never on biases")
    clip_norm: float | None = Field(
        None, gt=0, description="largest norm of the gradient of all heads together; null never clips"
    )
