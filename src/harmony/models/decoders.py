"""Decoders: from the encoder's tokens back to pixels and to words, or to what was not encoded.

Shapes: B images or captions, N patches, K kept patches, R removed ones, M masked words, D encoder width, W decoder
width, T words.
"""

from typing import Literal, cast

import torch
from open_clip.transformer import QuickGELU, Transformer
from torch import Tensor, nn

from harmony.models.blocks import PackedBlock, Packing
from harmony.models.positions import sine_cosine_positions
from harmony.models.recomputing import Checkpointing, Recomputing, through
from harmony.models.text import VOCABULARY, Attention, text_block, visible


class PixelDecoder(Recomputing):
    """MAE's decoder: kept tokens, mask tokens in the gaps, positions, transformer blocks, pixels of the gaps.

    Attributes:
        positions: (1, 1 + N, W) fixed; the class token's is zero.
    """

    positions: Tensor

    def __init__(
        self,
        encoder_width: int,
        grid: tuple[int, int],
        patch: int,
        width: int,
        depth: int,
        heads: int,
        positions: Literal["sine_cosine", "none"],
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.blocks = image_blocks(width, heads, depth)
        self.norm = nn.LayerNorm(width)
        self.pixels = nn.Linear(width, patch * patch * 3)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        table = torch.zeros(1 + grid[0] * grid[1], width)
        if positions == "sine_cosine":
            nn.init.normal_(self.mask_token, std=0.02)
            table[1:] = sine_cosine_positions(width, grid)
        self.register_buffer("positions", table[None])

    def forward(self, tokens: Tensor, prefix: int, kept: Tensor, removed: Tensor) -> Tensor:
        """Predict the removed patches.

        Args:
            tokens: (B, prefix + K, D) from the encoder.
            prefix: number of class and register tokens; only the class token enters the decoder.
            kept: (B, K) int64, places of the kept patches.
            removed: (B, N - K) int64, places of the others.

        Returns:
            (B, N - K, patch * patch * 3).
        """
        return self.pixels(self.features(tokens, prefix, kept, removed))

    def features(self, tokens: Tensor, prefix: int, kept: Tensor, removed: Tensor) -> Tensor:
        """(B, N - K, W), what the pixels of the removed patches are read from; arguments as for `forward`."""
        seen = self.embed(torch.cat([tokens[:, :1], tokens[:, prefix:]], dim=1))
        x = gaps_first(seen, self.mask_token, self.positions[0], kept, removed)
        return self.norm(run_blocks(self.blocks, x, self.checkpointing, first=removed.shape[1]))


class FeatureDecoder(Recomputing):
    """What patches that were removed would be encoded to: as MAE's decoder, at the encoder's own width, without pixels.

    Attributes:
        positions: (1, 1 + N, D) fixed; the class token's is zero.
    """

    positions: Tensor

    def __init__(self, width: int, grid: tuple[int, int], depth: int, heads: int) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.empty(width).normal_(std=0.02))
        self.blocks = image_blocks(width, heads, depth)
        self.norm = nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        table = torch.zeros(1 + grid[0] * grid[1], width)
        table[1:] = sine_cosine_positions(width, grid)
        self.register_buffer("positions", table[None])

    def forward(self, tokens: Tensor, prefix: int, kept: Tensor, removed: Tensor) -> Tensor:
        """(B, prefix + K, D), (B, K) and (B, N - K) -> (B, N - K, D), arguments as those of `PixelDecoder`."""
        seen = torch.cat([tokens[:, :1], tokens[:, prefix:]], dim=1)
        x = gaps_first(seen, self.mask_token, self.positions[0], kept, removed)
        return self.norm(run_blocks(self.blocks, x, self.checkpointing, first=removed.shape[1]))


def image_blocks(width: int, heads: int, depth: int) -> nn.ModuleList:
    """A decoder's blocks, timm's as those of the tower are."""
    return nn.ModuleList(PackedBlock(width, heads, qkv_bias=True, norm_layer=nn.LayerNorm) for _ in range(depth))


def run_blocks(blocks: nn.ModuleList, x: Tensor, checkpointing: Checkpointing, first: int) -> Tensor:
    """(B, n, W) -> (B, first, W), one block after the other; the last makes no token but the first ones."""
    *most, last = (cast(PackedBlock, block) for block in blocks)
    images, length, _ = x.shape
    packing, packed = Packing(((images, length),)), x.flatten(0, 1)
    for block in most:
        packed = through(block.packed, checkpointing, packed, packing)
    return through(last.packed_first, checkpointing, packed, packing, [first]).unflatten(0, (images, first))


def gaps_first(seen: Tensor, mask_token: Tensor, positions: Tensor, kept: Tensor, removed: Tensor) -> Tensor:
    """What a decoder begins with: mask tokens for the removed patches, then what was encoded, each with its position.

    A transformer does not mind the order, and so those that are read come first.

    Args:
        seen: (B, 1 + K, W) class token and kept patches.
        mask_token: (W,).
        positions: (1 + N, W), the class token's first.
        kept: (B, K) int64, places of the kept patches.
        removed: (B, R) int64, those of the others.

    Returns:
        (B, R + 1 + K, W).
    """
    places = torch.cat([torch.zeros_like(kept[:, :1]), kept + 1], dim=1)
    return torch.cat([mask_token + positions[removed + 1], seen + positions[places]], dim=1)


class WordDecoder(Recomputing):
    """Masked words from the text tower's tokens: a small transformer, a norm, a linear layer over the vocabulary.

    The output has one entry more than the tokenizer's vocabulary, for the mask token, as in the published model.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        layers: int,
        activation: Literal["gelu", "quick_gelu"],
        init: Literal["scaled", "default"],
    ) -> None:
        super().__init__()
        act = QuickGELU if activation == "quick_gelu" else nn.GELU
        self.transformer = Transformer(width, layers, heads, act_layer=act)
        self.norm = nn.LayerNorm(width)
        self.words = nn.Linear(width, VOCABULARY + 1)
        if init == "scaled":
            self._scale(width, layers)

    def _scale(self, width: int, layers: int) -> None:
        """The text tower's own initial spread (CLIP, arXiv 2103.00020), and 0.01 for the vocabulary."""
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
        nn.init.normal_(self.words.weight, std=0.01)
        nn.init.zeros_(self.words.bias)

    def forward(self, tokens: Tensor, end: Tensor, index: Tensor, attention: Attention) -> Tensor:
        """Scores of the masked words.

        Args:
            tokens: (B, T, W) from the text tower.
            end: (B,) places of the end tokens.
            index: (M,) flat places of the masked words in B * T.
            attention: what a word may see.

        Returns:
            (M, vocabulary + 1).
        """
        x, seen = tokens, visible(tokens.shape[1], end, attention)
        for block in self.transformer.resblocks:
            x = through(text_block, self.checkpointing, block, x, seen)
        return self.words(self.norm(x.flatten(0, 1)[index]))
