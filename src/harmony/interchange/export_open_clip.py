"""Both towers as a folder for `open_clip.create_model_and_transforms("local-dir:DIR")`.

open_clip builds a timm image tower by its name alone, at timm's own sizes. A tower of other sizes becomes open_clip's
own ViT, which computes the same: what it lacks, the bias of the patch embedding, is added to the positions.
"""

import math
from typing import Any

import timm
import torch
from timm.layers import LayerNorm, Mlp
from torch import Tensor, nn

from harmony.errors import UserError
from harmony.interchange.export import Exported, Written
from harmony.models.text import VOCABULARY


def written(what: Exported) -> Written:
    """Description and weights; without a contrastive objective the temperature is the one open_clip begins with.

    Raises:
        UserError: there is no text tower, or open_clip cannot express the image tower.
    """
    text, config = what.towers.text, what.model.text
    if text is None or config is None:
        raise UserError(f"{what.name} has no text tower, and an open_clip model needs one; use --to timm")
    quick = config.activation == "quick_gelu"
    if _is_timms_own(what):
        vision, visual = _timm_tower(what)
    else:
        vision, visual = _own_vit(what, quick)
    model: dict[str, Any] = {
        "embed_dim": what.towers.embed,
        "vision_cfg": vision,
        "text_cfg": {
            "context_length": config.context,
            "vocab_size": VOCABULARY,
            "width": config.width,
            "heads": config.heads,
            "layers": config.layers,
        },
        "custom_text": True,
        "quick_gelu": quick,
    }
    scalars = {"logit_scale": torch.tensor(math.log(1 / 0.07))} | dict(what.contrast)
    if "logit_bias" in scalars:
        model["init_logit_bias"] = float(scalars["logit_bias"])
    image = what.model.image
    preprocess = {
        "mean": list(image.mean),
        "std": list(image.std),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    weights = scalars | {f"visual.{k}": v for k, v in visual.items()}
    weights |= {f"text.{name}": value for name, value in text.transformer.state_dict().items()}
    return {
        "open_clip_config.json": {"model_cfg": model, "preprocess_cfg": preprocess},
        "open_clip_model.safetensors": {name: value.float() for name, value in weights.items()},
    }


def _is_timms_own(what: Exported) -> bool:
    """Whether timm's model of that name, as it is, has the tower's sizes."""
    trunk: Any = what.towers.image.trunk
    with torch.device("meta"):
        model: Any = timm.create_model(what.model.image.name, num_classes=0)
    same = {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in trunk.state_dict().items()}
    heads = model.blocks[0].attn.num_heads == trunk.blocks[0].attn.num_heads
    sizes = model.patch_embed.img_size == trunk.patch_embed.img_size
    return bool(same and heads and sizes and trunk.global_pool == "token")


def _timm_tower(what: Exported) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tower = what.towers.image
    vision = {
        "image_size": what.size,
        "timm_model_name": what.model.image.name,
        "timm_model_pretrained": False,
        "timm_pool": "token",
        "timm_proj": "linear",
    }
    weights = {f"trunk.{name}": value for name, value in tower.trunk.state_dict().items()}
    return vision, weights | {"head.proj.weight": tower.proj.weight}


def _own_vit(what: Exported, quick: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """open_clip's ViT and its weights."""
    tower = what.towers.image
    trunk: Any = tower.trunk
    block = trunk.blocks[0]
    reason = _why_not(trunk, quick)
    if reason:
        raise UserError(f"open_clip cannot express {what.name}, whose image tower {reason}")
    heads = block.attn.num_heads
    vision: dict[str, Any] = {
        "image_size": what.size,
        "patch_size": tower.patch,
        "layers": tower.depth,
        "width": tower.width,
        "head_width": tower.width // heads,
        "mlp_ratio": block.mlp.fc1.out_features / tower.width,
        "no_ln_pre": isinstance(trunk.norm_pre, nn.Identity),
        "norm_kwargs": {"eps": trunk.norm.eps},
    }
    if not isinstance(block.ls1, nn.Identity):
        vision["ls_init_value"] = 1.0
    return vision, _renamed(trunk) | {"proj": tower.proj.weight.T}


def _why_not(trunk: Any, quick: bool) -> str | None:
    """Why open_clip's ViT cannot be this trunk."""
    block = trunk.blocks[0]
    if trunk.num_reg_tokens:
        return "has registers; export it --to timm or huggingface"
    if trunk.global_pool != "token":
        return "puts its norm behind its pooling; export it --to timm"
    plain = type(block.mlp) is Mlp and isinstance(block.attn.q_norm, nn.Identity) and block.attn.qkv.bias is not None
    if not (
        plain and type(trunk.norm) is LayerNorm and isinstance(getattr(block.attn, "norm", nn.Identity()), nn.Identity)
    ):
        return "has blocks or norms of another make; export it --to timm"
    own = {"GELU": "gelu", "QuickGELU": "quick_gelu"}.get(type(block.mlp.act).__name__, "another")
    wanted = "quick_gelu" if quick else "gelu"
    if own != wanted:
        return (
            f"has other sizes than timm's model of that name and the activation {own}, while its text tower has "
            f"{wanted} (one activation serves both there); train with model.text.activation={own}, or export it "
            "--to timm"
        )
    return None


_NAMES = (
    ("norm1.", "ln_1."),
    ("norm2.", "ln_2."),
    ("attn.qkv.", "attn.in_proj_"),
    ("attn.proj.", "attn.out_proj."),
    ("mlp.fc1.", "mlp.c_fc."),
    ("mlp.fc2.", "mlp.c_proj."),
    ("ls1.", "ls_1."),
    ("ls2.", "ls_2."),
)


def _renamed(trunk: Any) -> dict[str, Tensor]:
    """timm's weights under open_clip's names."""
    state: dict[str, Tensor] = dict(trunk.state_dict())
    width = trunk.embed_dim
    positions = state.pop("pos_embed")[0]
    if trunk.no_embed_class:
        positions = torch.cat([positions.new_zeros(1, width), positions])
    bias = state.pop("patch_embed.proj.bias", None)
    if bias is not None:
        positions = torch.cat([positions[:1], positions[1:] + bias])
    named = {
        "class_embedding": state.pop("cls_token").reshape(width),
        "positional_embedding": positions,
        "conv1.weight": state.pop("patch_embed.proj.weight"),
    }
    for key, value in state.items():
        if key.startswith("blocks."):
            name = key.replace("blocks.", "transformer.resblocks.", 1)
            for theirs, ours in _NAMES:
                name = name.replace(f".{theirs}", f".{ours}")
        else:
            name = key.replace("norm_pre.", "ln_pre.").replace("norm.", "ln_post.")
        named[name] = value
    return named
