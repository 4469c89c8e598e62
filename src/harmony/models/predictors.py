"""Predictors: from the features of what an encoder saw to the features of what it did not see.

Shapes: B images, C context patches, T target blocks of L patches, D encoder width, W predictor width.
"""

import torch
from torch import Tensor, nn

from harmony.models.decoders import image_blocks, run_blocks
from harmony.models.positions import sine_cosine_positions
from harmony.models.recomputing import Recomputing


class BlockPredictor(Recomputing):
    """I-JEPA's predictor (arXiv 2301.08243, section 3): a narrow transformer that is asked for one block at a time.

    A block is asked for by a mask token at each of its places: one learned vector, and the place's position.

    Attributes:
        positions: (1 + N, W) fixed; the class token's is zero.
    """

    positions: Tensor

    def __init__(self, encoder_width: int, grid: tuple[int, int], width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.blocks = image_blocks(width, heads, depth)
        self.norm = nn.LayerNorm(width)
        self.features = nn.Linear(width, encoder_width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        table = torch.zeros(1 + grid[0] * grid[1], width)
        table[1:] = sine_cosine_positions(width, grid)
        self.register_buffer("positions", table)

    def forward(self, tokens: Tensor, prefix: int, kept: Tensor, blocks: Tensor) -> Tensor:
        """Predict the features of the blocks.

        Args:
            tokens: (B, prefix + C, D) from the encoder.
            prefix: number of class and register tokens; only the class token enters the predictor.
            kept: (B, C) int64, places of the context patches.
            blocks: (B, T, L) int64, places of each block's patches.

        Returns:
            (B, T, L, D).
        """
        targets, length = blocks.shape[1:]
        seen = self.embed(torch.cat([tokens[:, :1], tokens[:, prefix:]], dim=1))
        places = torch.cat([torch.zeros_like(kept[:, :1]), kept + 1], dim=1)
        seen = seen + self.positions[places]
        asked = (self.mask_token + self.positions[blocks + 1]).flatten(0, 1)  # (B * T, L, W)
        x = torch.cat([asked.to(seen.dtype), seen.repeat_interleave(targets, dim=0)], dim=1)
        x = run_blocks(self.blocks, x, self.checkpointing, first=length)
        return self.features(self.norm(x)).unflatten(0, (-1, targets))
