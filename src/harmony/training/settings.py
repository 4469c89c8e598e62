"""The settings of the loop: the recipe's `optim`, `teacher`, `train` and `efficiency`."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from harmony.models.recomputing import Checkpointing
from harmony.schedules import Duration, DurationField, NonNegative, Schedule, Share


def _longer_than_nothing(duration: Duration) -> Duration:
    if duration.amount <= 0:
        raise ValueError("must be more than nothing; write it as '1 epoch' or '10 steps'")
    return duration


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Cadence = Annotated[DurationField, AfterValidator(_longer_than_nothing)]
"""A duration above zero: how often something is done."""

LARGEST_SEED = 2**62 - 1
"""Of `train.seed`: what generators and files hold without loss."""

Logger = Literal["tensorboard", "wandb"]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class OptimConfig(_Settings):
    """AdamW (Loshchilov and Hutter, 2019) and its schedules."""

    lr: float = Field(
        5e-4, gt=0, lt=10, description="peak learning rate for a batch of 256; scaled by batch_size / 256"
    )
    final_lr: float = Field(1e-6, ge=0, lt=10, description="learning rate at the end of the run, not scaled")
    warmup: DurationField = Field(
        Duration(amount=3, unit="epochs"), description="how long the learning rate rises linearly from zero"
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.98), description="decay of the running means of the gradient and of its square"
    )
    eps: float = Field(1e-6, gt=0, lt=1, description="added to the root of the mean square, against division by zero")
    weight_decay: NonNegative = Field(
        Schedule(shape="cosine", start=0.04, stop=0.4), description="decoupled weight decay, times the learning rate"
    )
    decay: Literal["weights_only", "published"] = Field(
        "weights_only",
        description="what decays: weights_only spares norms, biases, class, register and mask tokens, positions and "
        "temperatures; published spares only one-dimensional tensors and biases (the published code's quirk C16)",
    )
    clip_norm: float | None = Field(3.0, gt=0, description="largest norm of the gradient; null never clips")
    clip_scope: Literal["all", "image_tensors"] = Field(
        "all",
        description="all clips the global norm over every trained parameter; image_tensors clips each tensor of the "
        "image tower by itself and nothing else (the published code's quirk C18)",
    )


class TeacherConfig(_Settings):
    """The slow copy of both towers and of the heads that want one."""

    momentum: Share = Field(
        Schedule(shape="cosine", start=0.996, stop=1.0),
        description="share of the teacher's old weights that is kept in each step",
    )


class TrainConfig(_Settings):
    """How long, in which precision, and what is kept of the run."""

    epochs: float = Field(
        25,
        gt=0,
        le=1e6,
        description="passes over the data; `steps` goes first, unless the override is of epochs",
    )
    steps: int | None = Field(None, ge=1, description="optimiser steps of the whole run, in place of epochs")
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="seed of the weights and of every random stream")
    precision: Literal["bf16", "fp16", "fp32"] = Field(
        "bf16", description="arithmetic of the forward and backward passes; weights and optimiser stay fp32"
    )
    accumulate: int = Field(
        1,
        ge=1,
        le=4096,
        description="parts a batch is cut into, run one after the other; losses that compare the examples of a batch "
        "with each other (clip) then compare within a part only",
    )
    checkpoint_every: Cadence = Field(
        Duration(amount=1, unit="epochs"), description="how often a checkpoint is saved; one is always saved at the end"
    )
    keep: int = Field(3, ge=1, description="checkpoints kept; older ones are removed")
    log_every: Cadence = Field(
        Duration(amount=10, unit="steps"), description="how often a line is written to log.jsonl"
    )
    max_skipped_steps: int = Field(
        2, ge=0, le=1000, description="steps in a row that may be skipped for a loss that is not finite"
    )
    loggers: Annotated[list[Logger], BeforeValidator(_one_or_many)] = Field(
        default_factory=list, description="where to log besides log.jsonl: tensorboard, wandb"
    )


class EfficiencyConfig(_Settings):
    """Speed and memory; nothing here may change results."""

    backward: Literal["joint", "sequential"] = Field(
        "sequential",
        description="sequential runs backward as soon as a group of objectives has its losses, so that its activations "
        "are freed before the next group runs; joint runs one backward over the sum",
    )
    checkpointing: Checkpointing = Field(
        "none",
        description="what is computed again in backward instead of kept: pointwise, norms and activations but no "
        "matrix product; blocks, all that is inside the blocks of towers and decoders",
    )
    compile: bool = Field(False, description="compile the image towers' blocks with torch.compile")
    deterministic: bool = Field(
        True, description="choose kernels that repeat bit for bit; false allows faster ones on a GPU"
    )
    augment: Literal["auto", "worker", "device"] = Field(
        "auto",
        description="where colours are changed: in the loader's workers or on the device; auto is device on a GPU",
    )
