"""A recipe: the whole run as one validated object, from a YAML file and overrides."""

import hashlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from harmony import recipe_files
from harmony.data.settings import DataConfig
from harmony.data.views import ViewConfig
from harmony.errors import UserError, unknown
from harmony.evaluation.settings import EvaluationConfig
from harmony.models.settings import FrozenConfig, ModelConfig
from harmony.models.trunk import patch_size
from harmony.objectives.base import ObjectiveConfig
from harmony.objectives.registry import kinds
from harmony.recipe_files import Values
from harmony.schedules import Clock
from harmony.training.settings import EfficiencyConfig, OptimConfig, TeacherConfig, TrainConfig
from harmony.validation import validated

_NEUTRAL = (
    "name", "description", "needs", "family", "paper", "proof", "efficiency", "evaluation",
    "data.train", "data.val", "data.workers", "data.max_bad_share",
    "train.checkpoint_every", "train.keep", "train.log_every", "train.loggers", "train.max_skipped_steps",
)  # fmt: skip
"""Parts that leave the trained weights as they are (where the data lies is told by the data's own fingerprint)."""


Family = Literal[
    "joint", "language-image", "self-distillation", "contrastive", "clustering", "reconstruction", "prediction"
]
"""Kinds of methods: of images and captions, of images alone, and both at once (joint)."""


class Recipe(BaseModel):
    """A whole run. Every part's settings live with the code they belong to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(description="what reports call the run")] = "recipe"
    description: Annotated[str, Field(description="one line for `harmony recipes`")] = ""
    needs: Annotated[str, Field(description="data and machine it is meant for, likewise")] = ""
    family: Annotated[Family | None, Field(description="what kind of method it is, likewise")] = None
    paper: Annotated[str, Field(description="where the method was published, as 'arXiv 2405.14239'")] = ""
    proof: Annotated[str, Field(description="what has been measured of it, and where that is written")] = ""
    model: Annotated[ModelConfig, Field(description="both towers")] = ModelConfig()
    frozen: Annotated[
        dict[str, FrozenConfig], Field(description="models that are given and never change, by name")
    ] = {}
    data: Annotated[DataConfig, Field(description="image-caption pairs and how they are loaded")]
    views: Annotated[dict[str, ViewConfig], Field(min_length=1, description="named kinds of crops of each image")]
    objectives: Annotated[
        dict[str, SerializeAsAny[ObjectiveConfig]], Field(min_length=1, description="what is learned, by name")
    ]
    teacher: Annotated[TeacherConfig, Field(description="the slow copy")] = TeacherConfig()
    optim: Annotated[OptimConfig, Field(description="the optimiser")] = OptimConfig()
    train: Annotated[TrainConfig, Field(description="length, precision and bookkeeping")] = TrainConfig()
    efficiency: Annotated[EfficiencyConfig, Field(description="speed and memory, never results")] = EfficiencyConfig()
    evaluation: Annotated[EvaluationConfig, Field(description="what is measured at the end")] = EvaluationConfig()

    @field_validator("objectives", mode="before")
    @classmethod
    def _each_by_its_own_class(cls, objectives: Any) -> Any:
        if not isinstance(objectives, dict):
            return objectives
        return {name: _objective(name, values) for name, values in objectives.items()}

    @field_serializer("objectives", mode="wrap")
    def _type_only_where_it_differs(self, objectives: Any, serialize: Any) -> Any:
        written = serialize(objectives)
        for name, values in written.items():
            if values["type"] == name:
                del values["type"]
        return written

    @model_validator(mode="after")
    def _fits_together(self, info: ValidationInfo) -> Self:
        _check_crops(self)
        _check_frozen(self)
        _check_names(self, removed=(info.context or {}).get("removed", ()))
        _check_length(self)
        _check_evaluation(self)
        return self

    @property
    def largest_view(self) -> int:
        """Side in px of the largest crops."""
        return max(view.size for view in self.views.values())

    def to_dict(self) -> Values:
        """Plain values, in the form a recipe file has."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return recipe_files.written(self.to_dict())

    def save(self, path: Path | str) -> None:
        """Write the resolved recipe; `load` reads it back to an equal one."""
        Path(path).write_text(self.to_yaml(), encoding="utf-8")

    def fingerprint(self) -> str:
        """A hash of the settings that may change the trained weights."""
        text = json.dumps(results_of(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load(name_or_path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """The recipe of a name or a file, ready to run.

    Args:
        name_or_path: a name that `harmony recipes` lists, a YAML file, or a run directory.
        overrides: `dotted.key=value` each, the value as YAML; `objectives.NAME=null` removes an objective.

    Raises:
        UserError: anything in it is wrong or still to be given.
    """
    values, below = _values(name_or_path, overrides)
    to_give = recipe_files.missing(values)
    if to_give:
        added = " ".join(f"{key}=..." for key in to_give)
        example = ' (as in data.train="shards:pairs-{00000..00011}.tar")' if "data.train" in to_give else ""
        raise UserError(f"the recipe {values['name']!r} leaves {' and '.join(to_give)} open; add {added}{example}")
    return _checked(values, below)


def resolve(name_or_path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """As `load`, but data may still be open (`???`): for looking at a recipe and for its cost."""
    return _checked(*_values(name_or_path, overrides))


def _values(name_or_path: str | Path, overrides: list[str] | tuple[str, ...]) -> tuple[Values, Values]:
    """The values with what was removed still there as null, and what they were before the overrides."""
    below = recipe_files.read(str(name_or_path))
    return recipe_files.with_overrides(below, overrides), below


def _checked(values: Values, below: Values) -> Recipe:
    views, before = (
        section if isinstance(section, dict) else {} for section in (values.get("views"), below.get("views"))
    )
    removed = [name for name, view in views.items() if view is None]
    recipe = validated(Recipe, recipe_files.without_removed(values), removed=removed)
    used = {view for _, _, view, _ in _named_views(recipe)}
    for name in recipe.views:
        if name not in used and name not in before:
            hint = str(unknown("view", name, used)).partition("; ")[2]
            raise UserError(f"no objective uses the view {name!r}; {hint} (an objective's view names the one it uses)")
    return recipe


def differences(a: Recipe, b: Recipe) -> list[str]:
    """The dotted keys of settings that may change results and differ between two recipes."""
    mine, other = dict(recipe_files.flat(results_of(a))), dict(recipe_files.flat(results_of(b)))
    return [key for key in dict.fromkeys([*mine, *other]) if mine.get(key, _ABSENT) != other.get(key, _ABSENT)]


_ABSENT = object()


def results_of(recipe: Recipe) -> Values:
    """The part of a recipe that may change the trained weights."""
    values = recipe.to_dict()
    for key in _NEUTRAL:
        *sections, last = key.split(".")
        section = values
        for part in sections:
            section = section[part]
        section.pop(last, None)
    return values


def _objective(name: str, values: Any) -> Any:
    if isinstance(values, ObjectiveConfig):
        return values if values.type else values.model_copy(update={"type": name})
    if not isinstance(values, dict):
        raise UserError(f"objectives.{name} must be a section with keys, as in {{weight: 1}}, not {values!r}")
    kind = values.get("type") or name
    if kind not in kinds():
        raise unknown("type of objective" if "type" in values else "objective", str(kind), kinds(), within="")
    return validated(kinds()[kind].Config, {**values, "type": kind}, f"objectives.{name}")


def _check_crops(recipe: Recipe) -> None:
    own = patch_size(recipe.model.image.name)
    patch = recipe.model.image.patch or own
    for name, view in recipe.views.items():
        if view.size < patch:
            raise UserError(
                f"views.{name}.size {view.size} is smaller than one patch ({patch} px); make it a multiple of {patch} "
                "or lower model.image.patch"
            )
        if view.size % patch:
            below, above = view.size // patch * patch, (view.size // patch + 1) * patch
            raise UserError(
                f"views.{name}.size {view.size} is not a multiple of the patch size {patch}; "
                f"set it to {below} or {above}"
            )


def _check_frozen(recipe: Recipe) -> None:
    for name in recipe.frozen:
        if name in ("student", "teacher") or not name.isidentifier():
            raise UserError(f"frozen.{name} cannot be called so; choose another word, as in frozen.tokenizer")


def _named_views(recipe: Recipe) -> Iterator[tuple[str, str, str, bool]]:
    """Every view that an objective names: objective, setting, view, and whether the setting may be null."""
    for objective, config in recipe.objectives.items():
        for name, field in type(config).model_fields.items():
            view = getattr(config, name)
            if name.split("_")[-1] == "view" and view is not None:
                yield objective, name, view, NoneType in get_args(field.annotation)


def _check_names(recipe: Recipe, removed: Collection[str]) -> None:
    """The views that objectives name; their masks and borrowed heads are looked up when the objectives are built."""
    for objective, name, view, optional in _named_views(recipe):
        if view in recipe.views:
            continue
        key = f"objectives.{objective}.{name}"
        without = f"{key}=null does without" if optional else f"objectives.{objective}=null does without the objective"
        if view in removed:
            raise UserError(f"{key} is {view!r}, but this view was removed; {without}")
        hint = str(unknown("view", view, recipe.views)).partition("; ")[2]
        raise UserError(f"{key} is {view!r}, but no view has this name; {hint}{f' ({without})' if optional else ''}")


def _check_length(recipe: Recipe) -> None:
    warmup = recipe.optim.warmup
    if recipe.train.steps is None and warmup.unit == "epochs" and warmup.amount > recipe.train.epochs:
        raise _too_much_warmup(recipe, f"{recipe.train.epochs:g} epochs")
    if recipe.train.steps is not None and warmup.unit == "steps" and warmup.amount > recipe.train.steps:
        raise _too_much_warmup(recipe, f"{recipe.train.steps} steps")
    if warmup.unit == "%" and warmup.amount > 100:
        raise UserError(f"optim.warmup must be at most 100%, not {warmup}")


def _check_evaluation(recipe: Recipe) -> None:
    tasks = recipe.evaluation.tasks
    if recipe.data.val is None and tasks not in ("auto", ()):
        raise UserError(f"evaluation.tasks asks for {', '.join(tasks)}, but data.val is not given; add data.val=URI")


def _too_much_warmup(recipe: Recipe, length: str) -> UserError:
    return UserError(
        f"optim.warmup ({recipe.optim.warmup}) is longer than the run ({length}); shorten it, as in optim.warmup=10%, "
        f"or raise train.{'epochs' if recipe.train.steps is None else 'steps'}"
    )


def total_steps(recipe: Recipe, epoch_steps: int) -> int:
    """Optimiser steps of the run when an epoch of its data has `epoch_steps`."""
    return recipe.train.steps or max(1, round(recipe.train.epochs * epoch_steps))


def check_against_data(recipe: Recipe, epoch_steps: int) -> None:
    """The checks that need to know how many steps an epoch of the data has.

    Raises:
        UserError: the warm-up is longer than the run.
    """
    steps = total_steps(recipe, epoch_steps)
    if recipe.optim.warmup.steps(Clock(0, steps, epoch_steps)) > steps:
        raise _too_much_warmup(recipe, f"{steps} steps of {epoch_steps} an epoch")
