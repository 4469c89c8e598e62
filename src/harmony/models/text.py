"""The text tower: open_clip's TextTransformer with a mask token and a choice of attention.

Shapes: B captions, T words, D width, E shared width.
"""

from typing import Literal

import torch
from open_clip.transformer import QuickGELU, TextTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harmony.models.encodings import TextEncoding
from harmony.models.settings import TextConfig

VOCABULARY = 49408
"""Entries of open_clip's byte-pair vocabulary; the end token has the largest id."""

Attention = Literal["causal", "bidirectional"]


class TextTower(nn.Module):
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
        self.checkpointing = False
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

    def read(self, ids: Tensor, replace: Tensor | None = None, attention: Attention = "causal") -> TextEncoding:
        """Encode captions.

        A causal reading is exact for captions cut to the longest of the batch, since no word sees what follows it; a
        reading in both directions hides the padding instead.

        Args:
            ids: (B, T) int64, T up to the context, zero behind the end token.
            replace: (B, T) bool, words whose embedding becomes the mask token.
            attention: whether a word sees the words before it, or all words of its caption.
        """
        transformer = self.transformer
        x = transformer.token_embedding(ids)
        if replace is not None:
            x = torch.where(replace[..., None], self.mask_token.to(x.dtype), x)
        x = x + transformer.positional_embedding[: ids.shape[1]]
        end = ids.argmax(dim=1)
        mask = attention_mask(ids.shape[1], self.heads, end, attention)
        for block in transformer.transformer.resblocks:
            if self.checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, attn_mask=mask, use_reentrant=False)
            else:
                x = block(x, attn_mask=mask)
        return TextEncoding(x, end, transformer.ln_final, self.project)

    def project(self, token: Tensor) -> Tensor:
        """(..., D) -> (..., E)."""
        return token @ self.transformer.text_projection

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, E), the captions in the space shared with images."""
        return self.read(ids).embed()


def attention_mask(length: int, heads: int, end: Tensor, attention: Attention) -> Tensor:
    """What each word may see, as additive float: (T, T) when causal, (B * heads, T, T) when in both directions."""
    if attention == "causal":
        return torch.full((length, length), float("-inf"), device=end.device).triu(1)
    padding = torch.arange(length, device=end.device) > end[:, None]
    mask = torch.zeros(padding.shape, device=end.device).masked_fill(padding, float("-inf"))
    return mask[:, None, :].expand(-1, length, -1).repeat_interleave(heads, dim=0)
