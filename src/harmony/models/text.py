"""The text tower: open_clip's TextTransformer with a mask token and a choice of attention.

Shapes: B captions, T words, D width, E shared width.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, TextTransformer
from torch import Tensor, nn

from harmony.models.encodings import TextEncoding
from harmony.models.recomputing import Recomputing, keeping_inputs, through
from harmony.models.settings import TextConfig

VOCABULARY = 49408
"""Entries of open_clip's byte-pair vocabulary; the end token has the largest id."""

Attention = Literal["causal", "bidirectional"]


class TextTower(Recomputing):
    """open_clip's text transformer and a mask token.

    Attributes:
        transformer: the open_clip TextTransformer.
        mask_token: (D,), stands in for the embedding of a hidden word, so that token ids (and with them the place of
            the end token) stay as they are.
        width, context: D and the longest caption in tokens.
    """

    def __init__(self, config: TextConfig, embed: int) -> None:
        super().__init__()
        self.width = config.width
        self.heads = config.heads
        self.context = config.context
        self.transformer = TextTransformer(
            context_length=config.context,
            vocab_size=VOCABULARY,
            width=config.width,
            heads=config.heads,
            layers=config.layers,
            output_dim=embed,
            act_layer=QuickGELU if config.activation == "quick_gelu" else nn.GELU,
        )
        self.mask_token = nn.Parameter(torch.empty(config.width).normal_(std=0.02))

    def read(
        self, ids: Tensor, replace: Tensor | None = None, attention: Attention = "causal", pooled: bool = False
    ) -> TextEncoding:
        """Encode captions.

        A causal reading is exact for captions cut to the longest of the batch, since no word sees what follows it; a
        reading in both directions hides the padding instead.

        Args:
            ids: (B, T) int64, T up to the context, zero behind the end token.
            replace: (B, T) bool, words whose embedding becomes the mask token.
            attention: whether a word sees the words before it, or all words of its caption.
            pooled: whether nothing but the end token is read, so that the last block makes no other.
        """
        transformer = self.transformer
        x = transformer.token_embedding(ids)
        if replace is not None:
            x = torch.where(replace[..., None], self.mask_token.to(x.dtype), x)
        x = x + transformer.positional_embedding[: ids.shape[1]]
        end = ids.argmax(dim=1)
        seen = visible(ids.shape[1], end, attention)
        *blocks, last = transformer.transformer.resblocks
        for block in blocks:
            x = through(text_block, self.checkpointing, block, x, seen)
        x = through(text_block, self.checkpointing, last, x, seen, end if pooled else None)
        place = torch.zeros_like(end) if pooled else end
        return TextEncoding(x, place, ids.shape[1], transformer.ln_final, self.project)

    def project(self, token: Tensor) -> Tensor:
        """(..., D) -> (..., E)."""
        return token @ self.transformer.text_projection

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, E), the captions in the space shared with images."""
        return self.read(ids, pooled=True).embed()


def visible(length: int, end: Tensor, attention: Attention) -> Tensor | None:
    """The words that each word may see, (B, 1, 1, T) bool: those up to the end token; None where it is those before it.

    PyTorch's attention knows the causal case by itself, and has faster kernels for it than for a mask.
    """
    if attention == "causal":
        return None
    return (torch.arange(length, device=end.device) <= end[:, None])[:, None, None, :]


def text_block(
    block: ResidualAttentionBlock, x: Tensor, seen: Tensor | None, only: Tensor | None = None, lean: bool = False
) -> Tensor:
    """What open_clip's block computes, through PyTorch's scaled_dot_product_attention on one product for q, k and v.

    Args:
        block: its weights.
        x: (B, T, D) tokens.
        seen: what each word may see, as `visible` says it.
        only: (B,) places of the only words that are wanted, the last each may see; all are where it is None.
        lean: whether norms and activations are computed again in the backward pass.

    Returns:
        (B, T, D), or (B, 1, D).
    """
    attn, mlp = block.attn, block.mlp
    if only is None:
        qkv = keeping_inputs(lambda x: F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias), x, lean=lean)
        q, k, v = _heads(qkv, 3, attn)
    else:
        seen = visible(x.shape[1], only, "bidirectional")  # to the last word the causal case looks alike
        width = x.shape[2]
        weight, bias = attn.in_proj_weight, attn.in_proj_bias
        k, v = _heads(F.linear(block.ln_1(x), weight[width:], bias[width:]), 2, attn)
        x = x.gather(1, only[:, None, None].expand(-1, 1, width))
        (q,) = _heads(F.linear(block.ln_1(x), weight[:width], bias[:width]), 1, attn)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None)
    x = x + block.ls_1(attn.out_proj(attended.transpose(1, 2).flatten(2)))
    hidden = keeping_inputs(lambda x: mlp.c_fc(block.ln_2(x)), x, lean=lean)
    return x + block.ls_2(keeping_inputs(lambda hidden: mlp.c_proj(mlp.gelu(hidden)), hidden, lean=lean))


def _heads(joined: Tensor, count: int, attn: nn.MultiheadAttention) -> Tensor:
    """(B, T, count * D) -> (count, B, heads, T, D / heads)."""
    return joined.unflatten(2, (count, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
