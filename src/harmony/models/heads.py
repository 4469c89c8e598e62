"""Heads that turn tokens into scores over prototypes, as DINO (arXiv 2104.14294) and iBOT (arXiv 2111.07832) use them.

Shapes: M tokens, D width, K prototypes, H bottleneck.
"""

from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn


class HeadConfig(BaseModel):
    """Sizes of a prototype head."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prototypes: Annotated[int, Field(ge=2, description="K, number of prototypes")] = 8192
    hidden: Annotated[int, Field(ge=1, description="width of the hidden layers")] = 2048
    bottleneck: Annotated[int, Field(ge=1, description="width in which tokens meet the prototypes")] = 256
    layers: Annotated[int, Field(ge=1, le=6, description="linear layers before the prototypes")] = 3
    learn_lengths: Annotated[
        bool, Field(description="whether prototypes have lengths that are trained; if not, all have length 1")
    ] = False


class Prototypes(nn.Module):
    """A linear layer without bias whose rows are a direction times a length (weight normalisation, arXiv 1602.07868).

    Attributes:
        direction: (K, H) trained, of which only the direction counts.
        length: (K, 1), ones unless loaded otherwise; a parameter where it is learned, else a buffer.
    """

    length: Tensor

    def __init__(self, bottleneck: int, prototypes: int, learn_lengths: bool = False) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.empty(prototypes, bottleneck))
        nn.init.trunc_normal_(self.direction, std=0.02)
        ones = torch.ones(prototypes, 1)
        if learn_lengths:
            self.length = nn.Parameter(ones)
        else:
            self.register_buffer("length", ones)

    def forward(self, x: Tensor) -> Tensor:
        """(M, H) -> (M, K), in full precision: a temperature multiplies what rounding leaves."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.direction.dtype), self.length * F.normalize(self.direction, dim=1))


class PrototypeHead(nn.Module):
    """MLP with GELU, L2 normalisation, prototypes."""

    def __init__(self, width: int, config: HeadConfig) -> None:
        super().__init__()
        sizes = [width] + [config.hidden] * (config.layers - 1) + [config.bottleneck]
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(sizes)):
            linear = nn.Linear(a, b)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            layers += [nn.GELU(), linear] if i else [linear]
        self.mlp = nn.Sequential(*layers)
        self.prototypes = Prototypes(config.bottleneck, config.prototypes, config.learn_lengths)

    def bottleneck(self, tokens: Tensor) -> Tensor:
        """(M, D) -> (M, H), of unit length."""
        return F.normalize(self.mlp(tokens), dim=-1)

    def forward(self, tokens: Tensor) -> Tensor:
        """(M, D) -> (M, K) scores."""
        return self.prototypes(self.bottleneck(tokens))
