"""What the settings of several tasks have in common."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from harmony.schedules import Duration, DurationField


class Settings(BaseModel):
    """Settings of a task: frozen, and no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FitConfig(Settings):
    """How a task trains weights of its own (`harmony.evaluation.fitting`); every task has its own defaults."""

    epochs: float = Field(10, gt=0, le=1e6, description="passes over the training data; `steps` overrides it")
    steps: int | None = Field(None, ge=1, description="optimiser steps in all, in place of epochs")
    train_batch_size: int = Field(64, ge=1, le=65536, description="images an update sees, over all processes")
    lr: float = Field(1e-3, gt=0, lt=10, description="peak learning rate of AdamW, for the batch as it is")
    final_lr: float = Field(0.0, ge=0, lt=10, description="learning rate at the end, reached along a cosine")
    warmup: DurationField = Field(
        Duration(amount=5, unit="%"), description="how long the learning rate rises linearly from zero"
    )
    weight_decay: float = Field(0.05, ge=0, lt=10, description="decoupled weight decay; never on norms and biases")
    clip_norm: float | None = Field(1.0, gt=0, description="largest norm of the gradient; null never clips")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="arithmetic of the forward and backward passes")
    seed: int = Field(0, ge=0, lt=2**62, description="seed of first weights, order, augmentation")


def one_or_many(value: Any) -> Any:
    """A single word where a list of them may stand; "auto" stays as it is."""
    return [value] if isinstance(value, str) and value != "auto" else value
