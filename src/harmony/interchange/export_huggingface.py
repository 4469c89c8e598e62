"""The image tower as a folder for `transformers.AutoModel.from_pretrained(DIR)`, written without transformers.

A plain ViT becomes a ViTModel. One with layer scale or registers becomes a Dinov2Model or a Dinov2WithRegistersModel,
the same computation with these added; their registers have no positions, so ours are added to the register tokens.
"""

import re
from typing import Any

import torch
from timm.layers import LayerNorm, Mlp
from torch import Tensor, nn

from harmony.errors import UserError
from harmony.interchange.export import Exported, Written


def written(what: Exported) -> Written:
    """Configuration, weights, and how images are prepared.

    Raises:
        UserError: transformers has no model that computes the same.
    """
    trunk: Any = what.towers.image.trunk
    reason = _why_not(trunk)
    if reason:
        raise UserError(f"transformers has no ViT like that of {what.name}, which {reason}; export it --to timm")
    plain = isinstance(trunk.blocks[0].ls1, nn.Identity) and not trunk.num_reg_tokens
    weights = _vit_weights(trunk) if plain else _dinov2_weights(trunk, what.towers.image.mask_token)
    return {
        "config.json": _config(what, plain),
        "model.safetensors": weights,
        "preprocessor_config.json": {
            "image_processor_type": "BitImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": what.size},
            "resample": 3,  # bicubic
            "do_center_crop": True,
            "crop_size": {"height": what.size, "width": what.size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(what.model.image.mean),
            "image_std": list(what.model.image.std),
        },
    }


def _why_not(trunk: Any) -> str | None:
    block = trunk.blocks[0]
    if not isinstance(trunk.norm_pre, nn.Identity):
        return "has a norm before its blocks"
    if type(trunk.norm) is not LayerNorm:
        return "puts its norm behind its pooling"
    if type(block.mlp) is not Mlp or not isinstance(block.mlp.act, nn.GELU):
        return "has MLPs of another make"
    if not isinstance(block.attn.q_norm, nn.Identity) or not isinstance(
        getattr(block.attn, "norm", nn.Identity()), nn.Identity
    ):
        return "has norms within its attention"
    if block.attn.qkv.bias is None or trunk.patch_embed.proj.bias is None:
        return "leaves biases out"
    return None


def _config(what: Exported, plain: bool) -> dict[str, Any]:
    tower = what.towers.image
    trunk: Any = tower.trunk
    block = trunk.blocks[0]
    common = {
        "hidden_size": tower.width,
        "num_hidden_layers": tower.depth,
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": "gelu",
        "layer_norm_eps": trunk.norm.eps,
        "image_size": what.size,
        "patch_size": tower.patch,
        "num_channels": 3,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "torch_dtype": "float32",
    }
    hidden = block.mlp.fc1.out_features
    if plain:
        return {"architectures": ["ViTModel"], "model_type": "vit", "intermediate_size": hidden, **common}
    if hidden % tower.width:
        raise UserError(
            f"transformers has no DINOv2 model like {what.name}, whose MLPs are no whole number of times as wide as "
            "its tokens; export it --to timm"
        )
    own = {"mlp_ratio": hidden // tower.width, "layerscale_value": 1.0, "drop_path_rate": 0.0, "use_swiglu_ffn": False}
    if not trunk.num_reg_tokens:
        return {"architectures": ["Dinov2Model"], "model_type": "dinov2", "use_mask_token": True, **common, **own}
    return {
        "architectures": ["Dinov2WithRegistersModel"],
        "model_type": "dinov2_with_registers",
        "num_register_tokens": trunk.num_reg_tokens,
        **common,
        **own,
    }


_VIT = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_DINOV2 = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def _vit_weights(trunk: Any) -> dict[str, Tensor]:
    class_token, _, positions = _prefix(trunk)
    return _ends(trunk, class_token, positions) | _blocks(trunk, _VIT)


def _dinov2_weights(trunk: Any, mask_token: Tensor) -> dict[str, Tensor]:
    class_token, registers, positions = _prefix(trunk)
    named = _ends(trunk, class_token, positions) | _blocks(trunk, _DINOV2)
    named["embeddings.mask_token"] = mask_token[None]
    if registers is not None:
        named["embeddings.register_tokens"] = registers
    for index, block in enumerate(trunk.blocks):
        for place, scale in ((1, block.ls1), (2, block.ls2)):
            gamma = torch.ones(trunk.embed_dim) if isinstance(scale, nn.Identity) else scale.gamma
            named[f"encoder.layer.{index}.layer_scale{place}.lambda1"] = gamma
    return named


def _prefix(trunk: Any) -> tuple[Tensor, Tensor | None, Tensor]:
    """Class token, registers with their positions added, and the positions of class token and patches."""
    table, count = trunk.pos_embed, trunk.num_reg_tokens
    if trunk.no_embed_class:
        return trunk.cls_token, trunk.reg_token, torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
    registers = trunk.reg_token + table[:, 1 : 1 + count] if count else None
    return trunk.cls_token, registers, torch.cat([table[:, :1], table[:, 1 + count :]], dim=1)


def _ends(trunk: Any, class_token: Tensor, positions: Tensor) -> dict[str, Tensor]:
    """What comes before the blocks and behind them."""
    return {
        "embeddings.cls_token": class_token,
        "embeddings.position_embeddings": positions,
        "embeddings.patch_embeddings.projection.weight": trunk.patch_embed.proj.weight,
        "embeddings.patch_embeddings.projection.bias": trunk.patch_embed.proj.bias,
        "layernorm.weight": trunk.norm.weight,
        "layernorm.bias": trunk.norm.bias,
    }


def _blocks(trunk: Any, names: dict[str, str]) -> dict[str, Tensor]:
    """The blocks' weights; queries, keys and values are one matrix in timm and three in transformers."""
    named: dict[str, Tensor] = {}
    for key, value in trunk.blocks.state_dict().items():
        found = re.fullmatch(r"(\d+)\.(.+)\.(weight|bias)", key)
        if found is None:  # layer scale
            continue
        index, module, kind = found.groups()
        layer = f"encoder.layer.{index}"
        if module == "attn.qkv":
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                named[f"{layer}.attention.attention.{part}.{kind}"] = piece
        else:
            named[f"{layer}.{names[module]}.{kind}"] = value
    return named
