"""A plain ViT that attends within windows, but for a few blocks (ViTDet, arXiv 2203.16527, section 3).

Shapes: B images, h x w patches, P class and register tokens, D width.
"""

from collections.abc import Iterator

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from harmony.errors import UserError

GLOBAL_BLOCKS = 4
"""Blocks that attend over the whole image, evenly spaced, the last one among them."""


class WindowedViT(nn.Module):
    """Images to one map of patch tokens.

    A window at the right or lower border holds what is left of the grid, so nothing is padded. Class and register
    tokens are part of every window, and each takes the mean of what the windows make of it, by their patches; where one
    window covers the grid, this is attention as it was in pre-training.

    Args:
        model: the trained trunk, which is kept and not copied; its positions fit the images that will come.
        window: side of a window in patches; None attends globally in all blocks.
        name: what errors call the encoder.

    Raises:
        UserError: the trunk is no plain ViT.
    """

    def __init__(self, model: nn.Module, window: int | None, name: str = "this encoder") -> None:
        super().__init__()
        if not _is_plain(model):
            raise UserError(f"detection needs a plain ViT, and {name} is another kind of model; evaluate a ViT")
        assert isinstance(model, VisionTransformer)
        model.reset_classifier(0, "")  # drops what a classifier alone would use
        self.model = model
        self.window = window
        self.width: int = model.embed_dim
        self.prefix: int = model.num_prefix_tokens
        self.patch: int = model.patch_embed.patch_size[0]
        self.whole = global_blocks(len(model.blocks))

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) normalised -> (B, D, h, w), after the trunk's final norm."""
        model = self.model
        grid = (pixels.shape[-2] // self.patch, pixels.shape[-1] // self.patch)
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(pixels))))
        for place, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            whole = self.window is None or place in self.whole
            x = x + block.drop_path1(block.ls1(self._attend(block, block.norm1(x), grid, whole)))
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return model.norm(x)[:, self.prefix :].transpose(1, 2).unflatten(2, grid)

    def _attend(self, block: Block, x: Tensor, grid: tuple[int, int], whole: bool) -> Tensor:
        if whole or self.window is None or self.window >= max(grid):
            return block.attn(x)
        return attend_in_windows(block.attn, x, grid, self.window, self.prefix)


def _is_plain(model: nn.Module) -> bool:
    return (
        isinstance(model, VisionTransformer)
        and isinstance(model.patch_embed, PatchEmbed)
        and all(isinstance(block, Block) for block in model.blocks)
    )


def global_blocks(depth: int) -> set[int]:
    """Which of `depth` blocks attend globally: 2, 5, 8 and 11 of 12."""
    return {-(-(quarter + 1) * depth // GLOBAL_BLOCKS) - 1 for quarter in range(GLOBAL_BLOCKS)}


def attend_in_windows(attn: nn.Module, x: Tensor, grid: tuple[int, int], side: int, prefix: int) -> Tensor:
    """Self-attention within windows: (B, P + h*w, D) -> the same.

    Args:
        attn: attention over (n, tokens, D).
        x: class and register tokens, then patches in row-major order.
        grid: h, w.
        side: of a window, in patches.
        prefix: P.
    """
    images, special = x.shape[0], x[:, :prefix]
    patches = x[:, prefix:].unflatten(1, grid)
    out = torch.empty_like(patches)
    special_sum = torch.zeros_like(special)
    for rows, high in _runs(grid[0], side):
        for columns, wide in _runs(grid[1], side):
            part = patches[:, rows, columns].unflatten(2, (-1, wide)).unflatten(1, (-1, high))  # B, n, high, m, wide, D
            across, down = part.shape[3], part.shape[1]
            windows = part.transpose(2, 3).flatten(3, 4).flatten(0, 2)
            beside = special.repeat_interleave(down * across, 0)
            attended = attn(torch.cat([beside, windows], 1))
            made = attended[:, prefix:].unflatten(1, (high, wide)).unflatten(0, (images, down, across))
            out[:, rows, columns] = made.transpose(2, 3).flatten(3, 4).flatten(1, 2).to(out.dtype)
            share = high * wide / (grid[0] * grid[1])
            special_sum = special_sum + share * attended[:, :prefix].unflatten(0, (images, -1)).sum(1)
    return torch.cat([special_sum, out.flatten(1, 2)], 1)


def _runs(length: int, side: int) -> Iterator[tuple[slice, int]]:
    """A side of the grid in stretches of equal windows: (where, side of the windows there)."""
    even = length // side * side
    if even:
        yield slice(0, even), side
    if even < length:
        yield slice(even, length), length - even
