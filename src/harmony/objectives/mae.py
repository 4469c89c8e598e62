"""Reconstruction of removed patches (masked autoencoders, arXiv 2111.06377).

Shapes: V crops, B images, N patches, K kept patches, R = N - K removed ones, P = patch * patch * 3 values of a patch.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from harmony.data.batch import Batch, Mask
from harmony.data.masks import MaskSampler, RandomPatches, check_share_removed
from harmony.data.views import ViewConfig
from harmony.models.decoders import PixelDecoder
from harmony.models.towers import Towers
from harmony.objectives.base import Encoded, ImageRequest, Objective, ObjectiveConfig, Request
from harmony.objectives.targets import full_precision
from harmony.schedules import At, Schedule, Share


class PixelDecoderConfig(BaseModel):
    """Sizes of the pixel decoder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self

    width: Annotated[int, Field(ge=4, multiple_of=4, description="token width")] = 512
    depth: Annotated[int, Field(ge=1, description="number of blocks")] = 8
    heads: Annotated[int, Field(ge=1, description="attention heads")] = 16
    positions: Annotated[
        Literal["sine_cosine", "none"],
        Field(description="positions added to its tokens; none is the published code's fault (audit C1)"),
    ] = "sine_cosine"


class Mae(Objective):
    """Few patches are encoded; a decoder predicts the pixels of the others."""

    class Config(ObjectiveConfig):
        """Settings of the reconstruction objective."""

        view: Annotated[str, Field(description="the view that is reconstructed, all crops of it")] = "global"
        mask_ratio: Annotated[Share, Field(description="share of the patches that is removed")] = Schedule.constant(
            0.75
        )
        decoder: PixelDecoderConfig = PixelDecoderConfig()
        normalise_targets: Annotated[bool, Field(description="whether each patch is brought to mean 0, variance 1")] = (
            True
        )
        over_crops: Annotated[
            Literal["mean", "sum"],
            Field(description="how crops are joined; sum doubles the weight for two crops, as published (audit C21)"),
        ] = "mean"

    config: Config

    def __init__(self, config: Config, towers: Towers, views: Mapping[str, ViewConfig]) -> None:
        super().__init__(config, towers, views)
        decoder = config.decoder
        rows, columns = towers.image.grid(views[config.view].size)
        for ratio in (config.mask_ratio.start, config.mask_ratio.stop):
            check_share_removed("objectives.mae.mask_ratio", ratio, rows * columns, config.view)
        self.patch = towers.image.patch
        self.decoder = PixelDecoder(
            towers.image.width,
            (rows, columns),
            self.patch,
            decoder.width,
            decoder.depth,
            decoder.heads,
            decoder.positions,
        )
        self.student = ImageRequest(config.view, keep="mae")

    def masks(self) -> Mapping[str, MaskSampler]:
        return {"mae": RandomPatches(view=self.config.view, ratio=self.config.mask_ratio)}

    def requests(self) -> Sequence[Request]:
        return [self.student]

    def forward(self, batch: Batch, encoded: Encoded, at: At) -> dict[str, Tensor]:
        encoding = encoded.image(self.student)
        mask = batch.masks["mae"]
        predicted = self._predict(encoding.tokens.flatten(0, 1), encoding.prefix, mask)  # (V * B, R, P)
        targets = self.targets(batch.images[self.config.view].flatten(0, 1), mask)
        error = (predicted - targets).square().mean()
        return {"mae": error * len(encoding.tokens) if self.config.over_crops == "sum" else error}

    def targets(self, pixels: Tensor, mask: Mask) -> Tensor:
        """(V * B, 3, S, S) -> (V * B, R, P), the removed patches in the form that is predicted."""
        return pixels_of_removed(pixels, self.patch, mask, self.config.normalise_targets)

    def _predict(self, tokens: Tensor, prefix: int, mask: Mask) -> Tensor:
        assert mask.kept is not None
        return full_precision(self.decoder(tokens, prefix, mask.kept.flatten(0, 1), places_removed(mask)))

    @torch.no_grad()
    def reconstruct(self, pixels: Tensor, tokens: Tensor, prefix: int, mask: Mask) -> Tensor:
        """Images with their removed patches as predicted, for pictures.

        Predictions of normalised patches get the mean and spread of the true ones, which only a picture may do.

        Args:
            pixels: (V, B, 3, S, S) normalised images.
            tokens: (V, B, prefix + K, D) encoder outputs of the kept patches.
            prefix: number of class and register tokens.
            mask: the mask that chose them.

        Returns:
            (V, B, 3, S, S).
        """
        flat = pixels.flatten(0, 1)
        predicted, removed = self._predict(tokens.flatten(0, 1), prefix, mask), places_removed(mask)
        patches = patchify(flat, self.patch)
        places = removed[..., None].expand(-1, -1, patches.shape[-1])
        if self.config.normalise_targets:
            variance, mean = torch.var_mean(patches.gather(1, places), dim=-1, keepdim=True)
            predicted = predicted * (variance + 1e-6).sqrt() + mean
        filled = patches.scatter(1, places, predicted.to(patches.dtype))
        return unpatchify(filled, self.patch, flat.shape[-1]).unflatten(0, pixels.shape[:2])


def pixels_of_removed(pixels: Tensor, patch: int, mask: Mask, normalise: bool) -> Tensor:
    """(V * B, 3, S, S) -> (V * B, R, P), the removed patches, each of mean 0 and variance 1 where normalised."""
    removed = places_removed(mask)
    patches = patchify(pixels, patch)
    patches = patches.gather(1, removed[..., None].expand(-1, -1, patches.shape[-1]))
    if not normalise:
        return patches
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def places_removed(mask: Mask) -> Tensor:
    """(V * B, R) int64, places of the removed patches, ascending."""
    images = mask.masked.shape[0] * mask.masked.shape[1]
    return (mask.index % mask.masked.shape[-1]).view(images, -1)


def patchify(pixels: Tensor, patch: int) -> Tensor:
    """(B, 3, H, W) -> (B, N, patch * patch * 3), colours innermost."""
    tiles = pixels.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, 3, rows, patch, columns, patch)
    return tiles.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch: int, size: int) -> Tensor:
    """(B, N, patch * patch * 3) -> (B, 3, size, size)."""
    tiles = patches.unflatten(1, (size // patch, -1)).unflatten(3, (patch, patch, 3))
    return tiles.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
