"""What an encoder hands out. Shapes: B images or captions, V crops, N patches, T words, D width, E shared width."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageEncoding:
    """Tokens of images after the final norm, with any leading shape (B, ...) or (V, B, ...).

    Attributes:
        tokens: (..., prefix + N, D): class token, registers, patches (only the kept ones in a kept-token pass); of a
            pooled pass the class token alone.
        prefix: number of class and register tokens.
        length: tokens an image that were encoded.
        project: the tower's projection of a token into the shared space.
        layers: outputs of the blocks that were asked for, by index, before the final norm, shaped as `tokens`.
        attention: (..., N), how the class token divides its attention over the patches, mean over blocks and heads and
            without gradients; what is missing to one lies on class and register tokens. Only where asked for.
    """

    tokens: Tensor
    prefix: int
    length: int
    project: Callable[[Tensor], Tensor]
    layers: dict[int, Tensor] = field(default_factory=dict)
    attention: Tensor | None = None

    @property
    def cls(self) -> Tensor:
        """(..., D), the class token."""
        return self.tokens[..., 0, :]

    @property
    def patches(self) -> Tensor:
        """(..., N, D), the patch tokens."""
        assert self.tokens.shape[-2] == self.length, "of a pooled pass there is the class token alone"
        return self.tokens[..., self.prefix :, :]

    def embed(self) -> Tensor:
        """(..., E), the class token in the space shared with captions, not normalised."""
        return self.project(self.cls)

    def embed_patches(self) -> Tensor:
        """(..., N, E), every patch in the space shared with captions, not normalised; projected as the class token."""
        return self.project(self.patches)

    def crop(self, index: int) -> "ImageEncoding":
        """One crop of a (V, B, ...) encoding."""
        return self.map(lambda tensor: tensor[index])

    def map(self, function: Callable[[Tensor], Tensor]) -> "ImageEncoding":
        """The same encoding with `function` applied to every tensor in it."""
        layers = {layer: function(tokens) for layer, tokens in self.layers.items()}
        attention = None if self.attention is None else function(self.attention)
        return replace(self, tokens=function(self.tokens), layers=layers, attention=attention)


@dataclass(frozen=True)
class TextEncoding:
    """Tokens of captions before the final norm.

    Attributes:
        tokens: (B, T, D); the end token alone, (B, 1, D), in a pooled pass.
        end: (B,) int64, position of each caption's end token among `tokens`.
        length: T, tokens a caption that were read.
        norm: the tower's final norm.
        project: the tower's projection of a normed token into the shared space.
    """

    tokens: Tensor
    end: Tensor
    length: int
    norm: Callable[[Tensor], Tensor]
    project: Callable[[Tensor], Tensor]

    def embed(self) -> Tensor:
        """(B, E), the end token in the space shared with images, not normalised."""
        place = self.end[:, None, None].expand(-1, 1, self.tokens.shape[-1])
        return self.project(self.norm(self.tokens.gather(1, place)[:, 0]))

    def embed_words(self) -> Tensor:
        """(B, T, E), every token in the space shared with images, not normalised; `counted` tells them from padding."""
        assert self.tokens.shape[1] == self.length, "of a pooled reading there is the end token alone"
        return self.project(self.norm(self.tokens))

    @property
    def counted(self) -> Tensor:
        """(B, T) bool, the tokens of the caption, begin and end included, without the padding behind them."""
        return torch.arange(self.tokens.shape[1], device=self.end.device) <= self.end[:, None]
