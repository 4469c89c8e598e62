"""The frozen models of a recipe, built and filled with their weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import timm

from harmony import recipe_files
from harmony.errors import UserError
from harmony.interchange.start import fill_trunk, weights_of
from harmony.interchange.weights import known_timm
from harmony.models.frozen import FrozenModel, FrozenTower
from harmony.models.settings import FrozenConfig, ImageConfig
from harmony.models.trunk import patch_size

_ALIKE = ("name", "patch", "width", "depth", "heads", "registers", "mean", "std")
"""Settings of an image tower that must be those of the run it comes from; not all of them show in its weights."""


def frozen_models(frozen: Mapping[str, FrozenConfig], student: ImageConfig, size: int) -> dict[str, FrozenModel]:
    """Build them.

    Args:
        frozen: their settings by name.
        student: the settings of the student's image tower, as which images are normalised.
        size: side in px of the largest view.

    Raises:
        UserError: a source does not exist, cannot be read, or was trained with other settings.
    """
    return {name: _frozen_model(f"frozen.{name}", config, student, size) for name, config in frozen.items()}


def _frozen_model(key: str, config: FrozenConfig, student: ImageConfig, size: int) -> FrozenModel:
    size = config.image.size or size
    patch = config.image.patch or patch_size(config.image.name)
    if size % patch:
        raise UserError(
            f"{key} has patches of {patch} px, which do not cut images of {size} px evenly; set {key}.image.size or "
            "views of another size, or take a model with other patches"
        )
    tower = FrozenTower(config.image, size, student.mean, student.std)
    if config.init is not None:
        _check_settings(key, config.image, config.init)
        fill_trunk(tower.trunk, weights_of(config.init, f"{key}.init"), config.init, f"{key}.image", f"{key}.init")
    return FrozenModel(tower)


def _check_settings(key: str, image: ImageConfig, source: str) -> None:
    """Refuse settings that differ from those the source was trained with, as far as it says them."""
    for name, value in _trained_with(source).items():
        given = getattr(image, name)
        if given != value:
            written = recipe_files.written_in_line({"": list(value) if isinstance(value, tuple) else value})
            raise UserError(
                f"{key}.image.{name} is {list(given) if isinstance(given, tuple) else given}, but {source} was trained "
                f"with another; set {key}.image.{name}={written.partition(': ')[2]}"
            )


def _trained_with(source: str) -> dict[str, Any]:
    """Settings of the image tower that a source tells by itself."""
    kind, _, name = source.partition(":")
    if kind == "timm":
        known_timm(name)
        told: Any = timm.get_pretrained_cfg(name, allow_unregistered=True)
        return {} if told is None else {"mean": tuple(told.mean), "std": tuple(told.std)}
    if kind == "open_clip":
        told = open_clip.get_pretrained_cfg(*name.partition("/")[::2])
        return {key: tuple(told[key]) for key in ("mean", "std") if key in told}
    if not (Path(source) / "recipe.yaml").is_file():
        return {}
    values = recipe_files.read(str(Path(source) / "recipe.yaml"))
    image = ImageConfig.model_validate(values["model"]["image"])
    return {key: getattr(image, key) for key in _ALIKE}
