"""Blocks of an image transformer on packed tokens: sequences of several lengths laid end to end.

Shapes: B images, n tokens an image, D width, S tokens laid end to end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from harmony.models.recomputing import keeping_inputs


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


def _inner_norm(attn: Attention) -> nn.Module:
    """timm's optional norm of the attended values; older releases have no such attribute."""
    return getattr(attn, "norm", nn.Identity())
