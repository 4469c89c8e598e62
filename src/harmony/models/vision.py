"""The image tower: a timm VisionTransformer with packed, masked and kept-token passes around its own modules.

Images of several sizes share one pass: their tokens are laid end to end, so that norms, linear layers and MLPs run once
on all of them, and only attention runs size by size. The tower's `trunk` stays a plain timm model: its state dict is
timm's, and called with one tensor it computes what timm computes.

Shapes: B images, N patches, K kept patches, D width, S tokens laid end to end.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from harmony.chance import Chance
from harmony.errors import UserError
from harmony.models.blocks import PackedBlock, Packing, class_attention
from harmony.models.encodings import ImageEncoding
from harmony.models.positions import resize_matrix, sine_cosine_positions
from harmony.models.recomputing import Recomputing, through
from harmony.models.settings import ImageConfig
from harmony.models.trunk import create_trunk


@dataclass(frozen=True)
class Segment:
    """Images of one size within a packed pass.

    Attributes:
        pixels: (B, 3, H, W) float, normalised.
        replace: (B, N) bool, patches whose embedding becomes the mask token.
        keep: (B, K) int64, the only patches that enter the sequence.
        layers: blocks whose outputs are wanted too.
        attention: whether the class token's attention is wanted too.
        pooled: whether nothing but the class token is read of the output.
        chance: (B) streams for stochastic depth; none is applied without.
    """

    pixels: Tensor
    replace: Tensor | None = None
    keep: Tensor | None = None
    layers: tuple[int, ...] = ()
    attention: bool = False
    pooled: bool = False
    chance: Chance | None = None


class ImageTower(Recomputing):
    """A timm ViT, a mask token and a projection into the space shared with captions.

    Attributes:
        trunk: the timm VisionTransformer, without a classifier.
        mask_token: (D,), stands in for hidden patches.
        proj: (D -> E) linear without bias.
        width, heads, patch, prefix, depth: D, attention heads, patch side in px, number of class and register tokens,
            number of blocks.
    """

    drop_rates: Tensor

    def __init__(self, config: ImageConfig, size: int, embed: int) -> None:
        """Build from settings.

        Args:
            config: the tower's settings.
            size: side in px that the learned positions are made for, where the settings leave it open.
            embed: E, width of the shared space.

        Raises:
            UserError: the name is not a plain timm ViT with a class token, or a size does not fit.
        """
        super().__init__()
        self.trunk = create_trunk(config, config.size or size)
        if config.position_embedding == "sine_cosine":
            _fix_positions(self.trunk)
        if config.freeze_patches:
            self.trunk.patch_embed.requires_grad_(False)
        self.width: int = self.trunk.embed_dim
        self.heads: int = cast(Attention, cast(PackedBlock, self.trunk.blocks[0]).attn).num_heads
        self.patch: int = self.trunk.patch_embed.patch_size[0]
        self.prefix: int = self.trunk.num_prefix_tokens
        self.depth: int = len(self.trunk.blocks)
        self.positions = config.positions
        self.drop_path = [config.drop_path * block / max(self.depth - 1, 1) for block in range(self.depth)]
        self.register_buffer("drop_rates", torch.tensor(self.drop_path), persistent=False)
        self._resize: dict[tuple[tuple[int, int], torch.dtype, torch.device], Tensor] = {}
        self.mask_token = nn.Parameter(torch.zeros(self.width))
        self.proj = nn.Linear(self.width, embed, bias=False)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        nn.init.normal_(self.proj.weight, std=self.width**-0.5)

    def grid(self, size: int) -> tuple[int, int]:
        """Patches a side for a square input of `size` px."""
        return size // self.patch, size // self.patch

    def encode(self, pixels: Tensor, layers: tuple[int, ...] = ()) -> ImageEncoding:
        """Encode whole images of one size, (B, 3, H, W) float and normalised."""
        return self.encode_packed([Segment(pixels, layers=layers)])[0]

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, E), the images in the space shared with captions."""
        return self.encode_packed([Segment(pixels, pooled=True)])[0].embed()

    def encode_packed(self, segments: Sequence[Segment]) -> list[ImageEncoding]:
        """Encode several groups of images, each of one size, in one pass over the blocks."""
        sequences = [self._embed(segment) for segment in segments]
        packing = Packing(tuple((tokens.shape[0], tokens.shape[1]) for tokens in sequences))
        x = torch.cat([tokens.flatten(0, 1) for tokens in sequences])
        keep = self._stochastic_depth(segments, packing)
        wanted = {layer % self.depth for segment in segments for layer in segment.layers}
        taken: dict[int, list[Tensor]] = {}
        attended: dict[int, list[Tensor]] = {i: [] for i, segment in enumerate(segments) if segment.attention}
        lengths = [length for _, length in packing.shapes]
        counts = [1 if s.pooled and not s.layers else n for s, n in zip(segments, lengths, strict=True)]
        for index, block in enumerate(cast(Iterable[PackedBlock], self.trunk.blocks)):
            rates = None if keep is None or self.drop_path[index] == 0 else keep[index]
            for i, weights in attended.items():
                weights.append(class_attention(block, packing.split(x)[i], self.prefix))
            if index == self.depth - 1 and counts != lengths:
                x = through(block.packed_first, self.checkpointing, x, packing, counts, rates)
                packing = packing.shortened(counts)
            else:
                x = through(block.packed, self.checkpointing, x, packing, rates)
            if index in wanted:
                taken[index] = packing.split(x)
        finals = packing.split(self.trunk.norm(x))
        return [
            ImageEncoding(
                finals[i],
                self.prefix,
                lengths[i],
                self.proj,
                {layer: taken[layer % self.depth][i] for layer in segment.layers},
                torch.stack(attended[i]).mean(0) if segment.attention else None,
            )
            for i, segment in enumerate(segments)
        ]

    def _embed(self, segment: Segment) -> Tensor:
        """(B, 3, H, W) -> (B, prefix + N or K, D): patches, masks, positions, class and register tokens."""
        trunk = self.trunk
        patches = trunk.patch_embed.proj(segment.pixels)
        grid = patches.shape[-2:]
        patches = trunk.patch_embed.norm(patches.flatten(2).transpose(1, 2))
        if segment.replace is not None:
            patches = torch.where(segment.replace[..., None], self.mask_token.to(patches.dtype), patches)
        prefix_positions, patch_positions = self._positions((grid[0], grid[1]))
        patches = patches + patch_positions
        if segment.keep is not None:
            patches = patches.gather(1, segment.keep[..., None].expand(-1, -1, self.width))
        prefix = torch.cat([token for token in (trunk.cls_token, trunk.reg_token) if token is not None], dim=1)
        if prefix_positions is not None:
            prefix = prefix + prefix_positions
        return trunk.norm_pre(torch.cat([prefix.expand(len(patches), -1, -1).to(patches.dtype), patches], dim=1))

    def _positions(self, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor]:
        """Learned positions of the prefix tokens, (1, prefix, D) or None, and of the patches of a grid, (1, N, D)."""
        table, own = self.trunk.pos_embed, self.trunk.patch_embed.grid_size
        assert table is not None
        count = 0 if self.trunk.no_embed_class else self.prefix
        prefix, patches = (table[:, :count] if count else None), table[:, count:]
        if grid == tuple(own):
            return prefix, patches
        if (grid, table.dtype, table.device) not in self._resize:
            matrix = resize_matrix((own[0], own[1]), grid, self.positions)
            self._resize[grid, table.dtype, table.device] = matrix.to(table.device, table.dtype)
        return prefix, self._resize[grid, table.dtype, table.device] @ patches

    def _stochastic_depth(self, segments: Sequence[Segment], packing: Packing) -> Tensor | None:
        """(depth, 2, S, 1) factors of the residual branches: 0 for a dropped image, 1 / (1 - rate) for the others.

        Deep networks with stochastic depth, arXiv 1603.09382. An image's draws come from its own stream.
        """
        if not self.training or self.drop_path[-1] == 0 or any(segment.chance is None for segment in segments):
            return None
        factors = []
        for segment, (_, length) in zip(segments, packing.shapes, strict=True):
            assert segment.chance is not None
            drawn = segment.chance.uniform("drop_path", self.depth, 2)
            survival = 1 - self.drop_rates[:, None]
            factor = (drawn < survival).to(drawn.dtype) / survival
            factors.append(factor.permute(1, 2, 0).repeat_interleave(length, dim=2))
        return torch.cat(factors, dim=2)[..., None]


def _fix_positions(trunk: VisionTransformer) -> None:
    """Sines and cosines for the trunk's positions, which are then no longer trained; zero for what is no patch.

    As in MAE (arXiv 2111.06377), MoCo v3 (arXiv 2104.02057) and the code of I-JEPA (arXiv 2301.08243).
    """
    if trunk.embed_dim % 4:
        raise UserError(
            f"positions of sines and cosines need a width that is a multiple of 4, and the image tower has "
            f"{trunk.embed_dim}; change model.image.width or set model.image.position_embedding to learned"
        )
    table = cast(nn.Parameter, trunk.pos_embed).requires_grad_(False)
    rows, columns = trunk.patch_embed.grid_size
    table.zero_()[:, -rows * columns :] = sine_cosine_positions(trunk.embed_dim, (rows, columns)).to(table)
