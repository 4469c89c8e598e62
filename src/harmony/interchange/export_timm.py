"""The image tower as a folder for `timm.create_model("local-dir:DIR", pretrained=True)`."""

from typing import Any

from harmony.interchange.export import Exported, Written
from harmony.models.trunk import changed_sizes


def written(what: Exported) -> Written:
    """The trunk's weights and timm's description of it. Mask token and projection stay behind: timm has neither."""
    trunk, image = what.towers.image.trunk, what.model.image
    size = [3, what.size, what.size]
    config: dict[str, Any] = {
        "architecture": image.name,
        "num_classes": 0,
        "num_features": trunk.num_features,
        "global_pool": trunk.global_pool,
        "model_args": {"img_size": what.size, "num_classes": 0, **changed_sizes(image)},
        "pretrained_cfg": {
            "tag": "harmony",
            "custom_load": False,
            "input_size": size,
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(image.mean),
            "std": list(image.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    return {"config.json": config, "model.safetensors": trunk.state_dict()}
