"""What is evaluated: an image encoder and, where there is one, a text encoder that share a space.

Shapes: B images or captions, E width of the embedding, D width of a token, h x w patches, S pixels a side.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor, nn

from harmony.errors import UserError
from harmony.models.settings import Colour


@dataclass(frozen=True)
class Layer:
    """What one block of the image encoder gives, after the encoder's final norm.

    Attributes:
        cls: (B, D), the class token; for an encoder without one, what it makes of the whole image.
        patches: (B, D, h, w), the patch tokens, as a map.
    """

    cls: Tensor
    patches: Tensor


@dataclass(frozen=True)
class Encoding:
    """Images encoded.

    Attributes:
        embedding: (B, E), in the space shared with texts where there is one; not of unit length.
        layers: the last blocks that were asked for, the very last one at the end.
    """

    embedding: Tensor
    layers: list[Layer] = field(default_factory=list)


class Encoder(ABC):
    """What every task asks of a model, wherever it comes from.

    Attributes:
        name: what messages and results call it.
        size: S, the side in px of the images it was made for; it takes others, with positions resized.
        patch: side in px of a patch (or stride of the map of an encoder without patches).
        mean, std: RGB mean and standard deviation that its inputs are normalised with.
        embed: E.
        width: D.
        depth: number of blocks.
        reads_text: whether it has a text tower.
        device: where it computes.
    """

    name: str
    size: int
    patch: int
    mean: Colour
    std: Colour
    embed: int
    width: int
    depth: int
    reads_text: bool
    device: torch.device

    @abstractmethod
    def fingerprint(self) -> str:
        """A short text that differs when weights or preprocessing do; features on disk are kept under it."""

    @abstractmethod
    def encode(self, pixels: Tensor, layers: int = 0) -> Encoding:
        """Encode images, with the last `layers` blocks (0 .. depth). Without gradients.

        Args:
            pixels: (B, 3, H, W) normalised, sides multiples of `patch`.
            layers: how many of the last blocks are wanted too.
        """

    @abstractmethod
    def texts(self, texts: Sequence[str]) -> Tensor:
        """B texts -> (B, E), not of unit length."""

    @abstractmethod
    def backbone(self, size: int, drop_path: float = 0.0) -> nn.Module:
        """A copy of the image tower to train on: a timm model without a classifier, all weights trainable.

        Its positions are resized to inputs of `size` px. It offers what every timm model does: `forward_features`,
        `forward_head`, `reset_classifier`, `forward_intermediates`, `group_matcher`.

        Args:
            size: side in px of its inputs.
            drop_path: stochastic depth rate of its last block.

        Raises:
            UserError: the encoder's image tower is no timm model, or it cannot take this size.
        """

    def shared(self, patches: Tensor) -> Tensor:
        """(B, D, h, w), patches of the last block -> (B, E, h, w), in the space shared with texts. Without gradients.

        Raises:
            UserError: the encoder has no way from one to the other.
        """
        raise UserError(f"{self.name} cannot put patches into the space it shares with texts; set head=linear")

    def images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) normalised -> (B, E), not of unit length."""
        return self.encode(pixels).embedding

    def normalise(self, pixels: Tensor) -> Tensor:
        """(..., 3, H, W) uint8 -> float32 as the image tower was trained on."""
        mean, std = (_plane(tuple(colour), pixels.device) for colour in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std

    def denormalise(self, pixels: Tensor) -> Tensor:
        """The inverse of `normalise`, rounded and kept within 0 .. 255: (..., 3, H, W) uint8."""
        mean, std = (_plane(tuple(colour), pixels.device) for colour in (self.mean, self.std))
        return ((pixels * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


@lru_cache(maxsize=16)
def _plane(colour: tuple[float, ...], device: torch.device) -> Tensor:
    """(3, 1, 1); kept, since to bring it to a GPU anew the host would wait there for all that is under way."""
    return torch.tensor(colour, device=device).view(3, 1, 1)


def off_patch(size: int, patch: int) -> str | None:
    """Why images of `size` px a side cannot be cut into patches of `patch` px; None when they can."""
    if size % patch == 0:
        return None
    below = size // patch * patch
    near = f"{below} or {below + patch}" if below else f"{patch}"
    return f"size {size} is not a multiple of the patch size {patch}; set it to {near}"


def hash_of(weights: Iterable[tuple[str, Tensor]], how: str) -> str:
    """A hash of named tensors and of what else changes an encoder's output."""
    digest = hashlib.blake2b(how.encode(), digest_size=16)
    for name, tensor in weights:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
