"""The timm model that an image tower's settings describe."""

from functools import cache
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn

from harmony.errors import UserError, unknown
from harmony.models.blocks import PackedBlock
from harmony.models.settings import ImageConfig


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
