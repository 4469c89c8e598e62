"""Any recipe at sizes for seconds: its objectives, views, masks and schedules as written, all sizes made small."""

from pathlib import Path
from typing import Any

from harmony import recipe as recipes
from harmony import recipe_files
from harmony.models.settings import ImageConfig
from harmony.recipe import Recipe

SMALL = {
    "patch": 8, "width": 16, "heads": 2, "depth": 2, "layers": 1, "context": 24, "embed": 16,
    "prototypes": 24, "hidden": 16, "bottleneck": 8, "output": 16, "queue": 16, "codes": 24,
}  # fmt: skip
"""Sizes by the name of their setting, wherever it stands; only what is larger is made smaller."""

LARGE_CROP = 40
"""Crops from this size on become 32 px, others 16."""


IMAGE = {"name": "vit_tiny_patch16_224", "patch": 8, "width": 16, "depth": 2, "heads": 2}
"""The image tower of every shrunk recipe."""


def shrunk(name: str, *overrides: str, frozen: Path | None = None) -> Recipe:
    """The recipe `name`, for runs of a few steps on a few scenes.

    Args:
        name: its name.
        overrides: laid over it at last.
        frozen: a shrunk run that stands for all of its frozen models; random ones where none is given.
    """
    values = recipe_files.without_removed(recipe_files.read(name))
    small = _small(values)
    image = values["model"]["image"]
    small["model"]["image"] = {
        **IMAGE,
        **{key: image[key] for key in ("registers", "drop_path") if isinstance(image, dict) and key in image},
    }  # fmt: skip
    for model in small.get("frozen", {}).values():
        colours = {key: ImageConfig.model_fields[key].default for key in ("mean", "std")}
        model |= {"image": IMAGE | colours, "init": None if frozen is None else str(frozen)}
    for view in small["views"].values():
        view["size"] = 32 if view["size"] >= LARGE_CROP else 16
    small["data"] |= {"train": "scenes:train?count=40", "val": None, "batch_size": 8, "workers": 0}
    small["optim"] = small.get("optim", {}) | {"warmup": "1 step"}
    small["train"] = {"steps": 4, "precision": "fp32", "log_every": "1 step", "checkpoint_every": "2 steps"}
    lines = [f"{key}={recipe_files.written_in_line({'v': value})[3:]}" for key, value in small.items() if value]
    return recipes.load(name, [*lines, *overrides])


def _small(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _small(inner, name) for name, inner in value.items()}
    if key in SMALL and isinstance(value, int) and not isinstance(value, bool):
        return min(value, SMALL[key])
    return value
