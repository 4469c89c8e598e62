"""open_clip's own ViT as a timm model, so that what is built for the one serves the other."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from open_clip.transformer import ResidualAttentionBlock
from open_clip.transformer import VisionTransformer as OpenClipViT
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn


def as_timm(visual: Any) -> tuple[VisionTransformer, Callable[[float], VisionTransformer]] | None:
    """The trunk of an open_clip image tower as a timm model with its weights, and how to make another such model.

    The timm model's pooled features times `visual.proj` are what the open_clip tower gives.

    Args:
        visual: an open_clip image tower.

    Returns:
        The model, and a function that makes one anew, given a stochastic depth rate; None for towers of other kinds and
        for those that timm's plain ViT has no equal of (attentional pooling, blocks of another make).
    """
    if type(visual) is not OpenClipViT or visual.attn_pool is not None or visual.pool_type not in ("tok", "avg"):
        return None
    if any(type(block) is not ResidualAttentionBlock for block in visual.transformer.resblocks):
        return None
    build = partial(_build, visual.image_size, visual.patch_size, _arguments(visual))
    model = build(0.0)
    state = _renamed(visual, model)
    if {key: value.shape for key, value in state.items()} != {k: v.shape for k, v in model.state_dict().items()}:
        return None
    model.load_state_dict(state)
    return model, build


def _build(
    size: tuple[int, int], patch: tuple[int, int], arguments: dict[str, Any], drop_path: float
) -> VisionTransformer:
    return VisionTransformer(size, patch, num_classes=0, drop_path_rate=drop_path, **arguments)


def _arguments(visual: Any) -> dict[str, Any]:
    block = visual.transformer.resblocks[0]
    averages = visual.pool_type == "avg"
    return {
        "embed_dim": visual.class_embedding.shape[0],
        "depth": len(visual.transformer.resblocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.c_fc.out_features / block.mlp.c_fc.in_features,
        "init_values": None if isinstance(block.ls_1, nn.Identity) else 1.0,
        "pre_norm": not isinstance(visual.ln_pre, nn.Identity),
        "global_pool": "avg" if averages else "token",
        # The norm of a single token is the same before pooling and after it.
        "fc_norm": averages and visual.final_ln_after_pool,
        "norm_layer": partial(nn.LayerNorm, eps=visual.ln_post.eps),
        "act_layer": partial(copy.deepcopy, block.mlp.gelu),
    }


def _renamed(visual: Any, model: VisionTransformer) -> dict[str, Tensor]:
    """The trunk's weights under timm's names."""
    under = {f"visual.{key}": value for key, value in visual.state_dict().items() if key != "proj"}
    named: dict[str, Tensor] = checkpoint_filter_fn(under, model)
    named = {key.replace(".ls_", ".ls"): value for key, value in named.items()}
    if visual.pool_type == "avg" and visual.final_ln_after_pool:
        named = {f"fc_{key}" if key.startswith("norm.") else key: value for key, value in named.items()}
    if isinstance(visual.ln_pre, nn.Identity):
        # timm's ViT without a norm before its blocks has a bias here.
        named["patch_embed.proj.bias"] = visual.class_embedding.new_zeros(visual.class_embedding.shape)
    return named
