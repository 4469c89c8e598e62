"""Projectors: the small MLPs, with batch normalisation, between an encoder and a loss that compares images.

Shapes: M tokens on this rank, D width.
"""

from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from harmony import ranks


class MlpConfig(BaseModel):
    """Sizes of an MLP whose output width is given elsewhere."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden: Annotated[int, Field(ge=1, description="width of the hidden layers")] = 2048
    layers: Annotated[int, Field(ge=1, le=6, description="linear layers")] = 2
    norm: Annotated[
        Literal["none", "hidden", "all"],
        Field(
            description="batch normalisation over all ranks: nowhere; in the hidden layers; behind the last one too, "
            "there without scale and shift"
        ),
    ] = "hidden"


class ProjectorConfig(MlpConfig):
    """Sizes of a projector."""

    output: Annotated[int, Field(ge=1, description="width of the space in which images are compared")] = 128


class JointBatchNorm(nn.Module):
    """Batch normalisation (arXiv 1502.03167) by the statistics of all ranks' tokens.

    torch.nn.SyncBatchNorm needs a GPU; this runs anywhere, and two ranks compute what one process does. It keeps no
    running statistics: no projector is used after pre-training, and a momentum encoder normalises its keys by their own
    batch too (MoCo v3, arXiv 2104.02057). All ranks must bring equally many tokens, as the loader sees to.
    """

    def __init__(self, width: int, affine: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """(M, D) -> (M, D), at least float32."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
            count = len(x) * ranks.count()
            centred = x - ranks.summed(x.sum(0)) / count
            variance = ranks.summed(centred.square().sum(0)) / count
            normed = centred * (variance + self.eps).rsqrt()
            if self.weight is None or self.bias is None:
                return normed
            return normed * self.weight + self.bias


def mlp(width: int, config: MlpConfig, output: int) -> nn.Sequential:
    """Linear layers from `width` to `output` with ReLU between them, torch's own first weights."""
    sizes = [width] + [config.hidden] * (config.layers - 1) + [output]
    layers: list[nn.Module] = []
    for number, (a, b) in enumerate(pairwise(sizes), start=1):
        last = number == config.layers
        normed = config.norm == "all" or (config.norm == "hidden" and not last)
        layers.append(nn.Linear(a, b, bias=not normed))  # a norm would take the bias out again
        if normed:
            layers.append(JointBatchNorm(b, affine=not last))
        if not last:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def projector(width: int, config: ProjectorConfig) -> nn.Sequential:
    """An MLP from the encoder's width to the width of the comparison."""
    return mlp(width, config, config.output)
