"""The image tower: a timm VisionTransformer with packed, masked and kept-token passes around its own modules.

Images of several sizes share one pass: their tokens are laid end to end, so that norms, linear layers and MLPs run once
on all of them, and only attention runs size by size. The tower's `trunk` stays a plain timm model: its state dict is
timm's, and called with one tensor it computes what timm computes.

Shapes: B images, N patches, K kept patches, D width, S tokens laid end to end.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

import timm
import torch
import torch.nn.functional as F
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from harmony.chance import Chance
from harmony.errors import UserError, unknown
from harmony.models.encodings import ImageEncoding
from harmony.models.positions import sine_cosine_positions
from harmony.models.recomputing import Recomputing, keeping_inputs, through
from harmony.models.settings import ImageConfig


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


@dataclass(frozen=True)
class Packing:
    """How the sequences of a packed pass lie end to end: (images, tokens an image) for each size."""

    shapes: tuple[tuple[int, int], ...]

    def split(self, tokens: Tensor) -> list[Tensor]:
        """(S, D) -> [(B, n, D), ...]."""
        pieces = tokens.split([images * length for images, length in self.shapes])
        return [piece.unflatten(0, shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def first(self, tokens: Tensor, counts: Sequence[int]) -> Tensor:
        """Of (S, D), the first tokens of every image, `counts` of them for each size."""
        pieces = zip(self.split(tokens), counts, strict=True)
        return torch.cat([piece[:, :count].flatten(0, 1) for piece, count in pieces])

    def shortened(self, counts: Sequence[int]) -> "Packing":
        """How the result of `first` lies."""
        return Packing(tuple((images, count) for (images, _), count in zip(self.shapes, counts, strict=True)))


class PackedBlock(Block):
    """timm's block that also takes tokens laid end to end. Its parameters and their names are timm's."""

    def packed(self, x: Tensor, packing: Packing, keep: Tensor | None = None, lean: bool = False) -> Tensor:
        """One block on packed tokens.

        Args:
            x: (S, D) tokens.
            packing: where one image ends and the next begins.
            keep: (2, S, 1) factors of the two residual branches (stochastic depth), or None.
            lean: whether norms and activations are computed again in the backward pass.

        Returns:
            (S, D).
        """
        attended = self.ls1(_attend(cast(Attention, self.attn), self.norm1, x, packing, lean))
        x = x + (attended if keep is None else attended * keep[0].to(attended.dtype))
        mixed = self.ls2(_mix(self.mlp, self.norm2, x, lean))
        return x + (mixed if keep is None else mixed * keep[1].to(mixed.dtype))

    def packed_first(
        self, x: Tensor, packing: Packing, counts: Sequence[int], keep: Tensor | None = None, lean: bool = False
    ) -> Tensor:
        """As `packed`, but only the first tokens of every image are made, `counts` of them for each size.

        They attend to all tokens; what else a block does, it does for each token alone.
        """
        attn, short = cast(Attention, self.attn), packing.shortened(counts)
        normed = self.norm1(x)
        weight, bias = attn.qkv.weight, attn.qkv.bias
        q_size = attn.num_heads * attn.head_dim
        q = F.linear(packing.first(normed, counts), weight[:q_size], None if bias is None else bias[:q_size])
        kv = F.linear(normed, weight[q_size:], None if bias is None else bias[q_size:])
        out = []
        for one, both in zip(short.split(q), packing.split(kv), strict=True):
            query = one.unflatten(2, (attn.num_heads, attn.head_dim)).transpose(1, 2)
            key, value = both.unflatten(2, (2, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(attn.q_norm(query), attn.k_norm(key), value)
            out.append(attended.transpose(1, 2).flatten(2).flatten(0, 1))
        x = packing.first(x, counts)
        rates = None if keep is None else [packing.first(rate, counts) for rate in keep]
        attended = self.ls1(attn.proj(_inner_norm(attn)(torch.cat(out))))
        x = x + (attended if rates is None else attended * rates[0].to(attended.dtype))
        mixed = self.ls2(_mix(self.mlp, self.norm2, x, lean))
        return x + (mixed if rates is None else mixed * rates[1].to(mixed.dtype))


def _attend(attn: Attention, norm: nn.Module, x: Tensor, packing: Packing, lean: bool) -> Tensor:
    """timm's self-attention on normed tokens, run separately for each size of a packed sequence."""
    out = []
    for qkv in packing.split(keeping_inputs(lambda x: attn.qkv(norm(x)), x, lean=lean)):
        q, k, v = qkv.unflatten(2, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(attn.q_norm(q), attn.k_norm(k), v)
        out.append(attended.transpose(1, 2).flatten(2).flatten(0, 1))
    inner = _inner_norm(attn)
    if len(out) == 1:
        return attn.proj(inner(out[0]))
    return keeping_inputs(lambda *pieces: attn.proj(inner(torch.cat(pieces))), *out, lean=lean)


def _mix(mlp: nn.Module, norm: nn.Module, x: Tensor, lean: bool) -> Tensor:
    """timm's MLP on normed tokens."""
    if not lean or type(mlp) is not Mlp:
        return keeping_inputs(lambda x: mlp(norm(x)), x, lean=lean)
    hidden = keeping_inputs(lambda x: mlp.fc1(norm(x)), x)
    return keeping_inputs(lambda hidden: mlp.fc2(mlp.norm(mlp.act(hidden))), hidden)


@torch.no_grad()
def class_attention(block: Block, tokens: Tensor, prefix: int) -> Tensor:
    """How the class token divides its attention, mean over the heads; the fused kernel never makes these weights.

    Args:
        block: whose attention.
        tokens: (B, n, D) that enter it.
        prefix: number of class and register tokens.

    Returns:
        (B, n - prefix), the weights on the patches.
    """
    attn, normed = cast(Attention, block.attn), block.norm1(tokens)
    (q_weight, k_weight, _), biases = attn.qkv.weight.chunk(3), attn.qkv.bias
    q_bias, k_bias, _ = (None, None, None) if biases is None else biases.chunk(3)
    shape = (attn.num_heads, attn.head_dim)
    q = F.linear(normed[:, :1], q_weight, q_bias).unflatten(2, shape).transpose(1, 2)  # (B, heads, 1, D / heads)
    k = F.linear(normed, k_weight, k_bias).unflatten(2, shape).transpose(1, 2)  # (B, heads, n, D / heads)
    scores = attn.q_norm(q) @ attn.k_norm(k).transpose(-2, -1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * attn.head_dim**-0.5
    return scores.softmax(dim=-1)[:, :, 0, prefix:].mean(dim=1)


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

    MAE (arXiv 2111.06377, section 3), MoCo v3 (arXiv 2104.02057, section 4.1), I-JEPA (arXiv 2301.08243).
    """
    if trunk.embed_dim % 4:
        raise UserError(
            f"positions of sines and cosines need a width that is a multiple of 4, and the image tower has "
            f"{trunk.embed_dim}; change model.image.width or set model.image.position_embedding to learned"
        )
    table = cast(nn.Parameter, trunk.pos_embed).requires_grad_(False)
    rows, columns = trunk.patch_embed.grid_size
    table.zero_()[:, -rows * columns :] = sine_cosine_positions(trunk.embed_dim, (rows, columns)).to(table)


def resize_matrix(own: tuple[int, int], grid: tuple[int, int], how: Literal["antialiased", "published"]) -> Tensor:
    """Bicubic interpolation of a grid as the linear map that it is, (rows * columns, own rows * own columns) float64.

    A matrix product has a gradient that is the same every time, which the gradient of an interpolation on a GPU is not.

    Args:
        own: rows and columns of the learned positions.
        grid: rows and columns wanted.
        how: antialiased to the exact grid, as timm does it, or by the published code's scale (n + 0.1) / N without.
    """
    units = torch.eye(own[0] * own[1], dtype=torch.float64).view(1, -1, *own)
    if how == "antialiased":
        resized = F.interpolate(units, size=grid, mode="bicubic", antialias=True)
    else:
        scale = ((grid[0] + 0.1) / own[0], (grid[1] + 0.1) / own[1])
        resized = F.interpolate(units, scale_factor=scale, mode="bicubic")
    return resized[0].flatten(1).T


def _inner_norm(attn: Attention) -> nn.Module:
    """timm's optional norm of the attended values; older releases have no such attribute."""
    return getattr(attn, "norm", nn.Identity())


def create_trunk(config: ImageConfig, size: int, drop_path: float = 0.0) -> VisionTransformer:
    """The timm model the settings describe, untrained, with packed blocks and no classifier.

    `drop_path` is timm's own stochastic depth, for a model that is trained by itself; a packed pass has another.
    """
    own_patch = patch_size(config.name)
    patch = config.patch or own_patch
    if size % patch:
        raise UserError(
            f"image size {size} is not a multiple of the patch size {patch}; set model.image.size, the views' size or "
            "model.image.patch so that it is"
        )
    changes = changed_sizes(config)
    try:
        trunk = timm.create_model(
            config.name, block_fn=PackedBlock, img_size=size, num_classes=0, drop_path_rate=drop_path, **changes
        )
    except (AssertionError, TypeError) as error:
        raise UserError(
            f"model.image cannot be built as {config.name} with {changes or 'its own sizes'}: {error}"
        ) from None
    assert isinstance(trunk, VisionTransformer)
    return trunk


def changed_sizes(config: ImageConfig) -> dict[str, Any]:
    """What shall differ from the timm model of that name, as arguments of `timm.create_model`."""
    wanted = {
        "patch_size": config.patch,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "reg_tokens": config.registers,
    }
    return {key: value for key, value in wanted.items() if value is not None}


@cache
def patch_size(name: str) -> int:
    """A timm model's own patch side in px; refuses what is not a plain ViT with a class token."""
    architecture, _, tag = name.partition(".")
    if tag:
        raise UserError(
            f"model.image {name!r} names weights; write model.image={architecture} and model.init=timm:{name}"
        )
    if name not in timm.list_models():
        raise unknown("timm model", name, timm.list_models(module="vision_transformer"))
    with torch.device("meta"):
        model: Any = timm.create_model(name)
    reason = _why_not_plain(model)
    if reason:
        raise UserError(
            f"model.image {name!r} {reason}; it must be a plain ViT with a class token, such as vit_small_patch16_224"
        )
    patch: int = model.patch_embed.patch_size[0]
    return patch


def _why_not_plain(model: nn.Module) -> str | None:
    if not isinstance(model, VisionTransformer):
        return f"is a {type(model).__name__}, not a plain VisionTransformer"
    if not model.has_class_token:
        return "has no class token"
    if type(model.patch_embed) is not PatchEmbed:
        return f"cuts its patches by a {type(model.patch_embed).__name__}"
    if model.pos_embed is None:
        return "has no learned positions"
    if any(type(block) is not Block or type(block.attn) is not Attention for block in model.blocks):
        return "has blocks of its own kind"
    # Newer releases of timm have an optional gate; older ones have no such attribute.
    if any(getattr(block.attn, "gate", None) is not None for block in model.blocks):
        return "has gated attention"
    return None
