"""Equal terms: what every row has in common, whatever its recipe says.

Data, image model, batch, length, precision and how things are measured are the first row's. The sizes of the text
tower are those of the first row that has one; a recipe without a text tower stays without. Everything else is the
method's own and stays: objectives, views, optimiser, teacher, and of the model what regularises (`drop_path`) and what
is not trained (`position_embedding`, `freeze_patches`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from harmony import recipe as recipes
from harmony import recipe_files
from harmony.comparison.rows import Asked, key_of
from harmony.data.settings import DataConfig
from harmony.errors import UserError, unknown
from harmony.models.settings import ModelConfig
from harmony.recipe import Recipe
from harmony.recipe_files import Values
from harmony.training.settings import TrainConfig

COMMON = (
    *(f"data.{key}" for key in (
        "train", "val", "batch_size", "workers", "caption_key", "image_key", "max_bad_share", "max_pixels", "shuffle",
    )),
    *(f"model.image.{key}" for key in (
        "name", "size", "patch", "width", "depth", "heads", "registers", "mean", "std",
    )),
    "model.embed", "model.init",
    *(f"train.{key}" for key in ("steps", "epochs", "precision", "accumulate", "checkpoint_every")),
)  # fmt: skip
"""Settings that are the first row's."""

TEXT = tuple(f"model.text.{key}" for key in ("width", "layers", "heads", "context", "activation"))
"""Settings that are those of the first row with a text tower."""

ALL_CHECKPOINTS = 1_000_000
"""`train.keep` of every run, since its checkpoints are measured once it has ended, and removed then."""

_DEFAULTS: Values = {
    "data": DataConfig().model_dump(mode="json"),
    "model": ModelConfig().model_dump(mode="json"),
    "train": TrainConfig().model_dump(mode="json"),
}
_SET_HERE = {
    "train.seed": "seeds are named by --seeds",
    "train.keep": "a comparison keeps the checkpoints that it measures",
}
_KINDS = {"objectives": "objective", "views": "view", "frozen": "frozen model"}
"""Sections of parts that one recipe has and another has not, and what such a part is called."""


@dataclass(frozen=True)
class Row:
    """A row as it is trained.

    Attributes:
        asked: what the command line says of it.
        recipe: on the terms of all rows; the seed is yet to be set.
        changes: what differs from its recipe for that, in words.
        copy: the copy of the towers that is measured, where recipe or overrides say `evaluation.model`.
    """

    asked: Asked
    recipe: Recipe
    changes: tuple[str, ...]
    copy: str | None = None

    @property
    def name(self) -> str:
        return self.asked.name

    def seeded(self, seed: int) -> Recipe:
        """The recipe of one run."""
        train = self.recipe.train.model_copy(update={"seed": seed, "keep": ALL_CHECKPOINTS})
        return self.recipe.model_copy(update={"train": train})


def on_equal_terms(asked: Sequence[Asked], shared: Sequence[str]) -> list[Row]:
    """The rows, each on the terms of all.

    Args:
        asked: two rows or more.
        shared: overrides of every row; one of an objective, a view, a frozen model or a text tower concerns the rows
            that have it.

    Raises:
        UserError: a row's recipe cannot work so, or names for itself what must be the same for all.
    """
    for row in asked:
        _check_own(row)
    shared = [part for override in shared for part in _apart(override)]
    left_out = _left_out(asked, shared)
    kept = [[override for override in shared if override not in left] for left in left_out]
    values = [_complete(row.values(overrides)) for row, overrides in zip(asked, kept, strict=True)]
    texts = [value for value in values if value["model"]["text"] is not None]
    rows: list[Row] = []
    for row, own, overrides, without in zip(asked, values, kept, left_out, strict=True):
        terms = {key: _at(values[0], key) for key in COMMON}
        if own["model"]["text"] is not None:
            terms |= {key: _at(texts[0], key) for key in TEXT}
        differs = {key: value for key, value in terms.items() if _at(own, key) != value}
        length = ["train.steps"] if "train.epochs" in differs else []  # or the epochs would take the place of the steps
        recipe = _loaded(row, [*overrides, *(_written(key, terms[key]) for key in (*differs, *length))])
        changes = [f"{override} left out: {reason}" for override, reason in without.items()]
        changes += [
            f"{key} {_shown(_at(own, key))} → {_shown(value)}"
            for key, value in differs.items()
            if key != "train.epochs" or terms["train.steps"] is None  # where steps are set, epochs decide nothing
        ]
        if rows:
            recipe, more = _measured_alike(recipe, rows[0])
            changes += more
        rows.append(Row(row, recipe, tuple(changes), copy=_at(own, "evaluation.model")))
    _check_sizes(rows)
    return rows


def _apart(override: str) -> list[str]:
    """The override of a whole section as those of what is in it, as rows may have some and lack others."""
    key = key_of(override)
    if key not in (*_KINDS, "model", "train"):
        return [override]
    value = _at(recipe_files.with_overrides({}, [override]), key)
    if not isinstance(value, dict):
        raise UserError(f"{override!r} cannot be of all rows; name a setting within, as in {key}.NAME=VALUE")
    return [_written(f"{key}.{name}", part) for name, part in value.items()]


def _check_own(row: Asked) -> None:
    for override in row.own:
        key = key_of(override)
        _check_free(override)
        clash = next((common for common in (*COMMON, *TEXT) if _touch(key, common)), None)
        measured = _touch(key, "evaluation") and key != "evaluation.model"
        without_text = "".join(override.split()) == "model.text=null"
        if (clash and not without_text) or measured:
            raise UserError(
                f"{override!r} cannot be of the row {row.name!r} alone, as all rows are compared on equal terms; give "
                "it outside of the quotes, for all"
            )


def _check_free(override: str) -> None:
    reason = _SET_HERE.get(key_of(override))
    if reason:
        raise UserError(f"{override!r} cannot be set: {reason}; leave it out")


def _touch(key: str, other: str) -> bool:
    """Whether setting one sets something of the other."""
    return key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.")


def _left_out(asked: Sequence[Asked], shared: Sequence[str]) -> list[dict[str, str]]:
    """By row, the shared overrides that do not concern it, and why.

    Raises:
        UserError: an override concerns no row, or is made by the comparison itself.
    """
    values = [_complete(row.values()) for row in asked]
    found: list[dict[str, str]] = [{} for _ in asked]
    for override in shared:
        key = key_of(override)
        _check_free(override)
        if key == "name":
            raise UserError(f"{override!r} names no row; write it within the quotes of the row that it names")
        for row, own in zip(found, values, strict=True):
            if reason := _unconcerned(override, own):
                row[override] = reason
        if all(override in row for row in found):
            section, _, rest = key.partition(".")
            if section == "model":
                raise UserError(f"{override!r} concerns no row, as none has a text tower; leave it out")
            known = {name for own in values for name in _names(own, section)}
            raise unknown(_KINDS[section], rest.partition(".")[0], known)
    return found


def _unconcerned(override: str, values: Values) -> str | None:
    """Why an override does not concern a recipe; None when it does."""
    key, _, value = override.partition("=")
    section, *rest = key.strip().split(".")
    if section in _KINDS and rest and rest[0] not in _names(values, section):
        return f"it has no {_KINDS[section]} {rest[0]!r}"
    if section == "model" and rest[:1] == ["text"] and value.strip() != "null" and values["model"]["text"] is None:
        return "it has no text tower"
    return None


def _names(values: Values, section: str) -> Iterator[str]:
    """The objectives, views or frozen models of a recipe, without those that are removed."""
    there = values.get(section)
    for name, value in there.items() if isinstance(there, dict) else ():
        if value is not None:
            yield name


def _complete(values: Values) -> Values:
    """With the defaults of data, model and train."""
    model = values.get("model")
    if isinstance(model, dict) and isinstance(model.get("image"), str):
        values = {**values, "model": {**model, "image": {"name": model["image"]}}}
    return recipe_files.merged(_DEFAULTS, values)


def _at(values: Values, key: str) -> Any:
    """The value at a dotted key; None where a section on the way is not there."""
    value: Any = values
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _written(key: str, value: Any) -> str:
    """An override."""
    return f"{key}={_shown(value)}"


def _shown(value: Any) -> str:
    return recipe_files.written_in_line({"v": value}).removeprefix("v: ")


def _loaded(row: Asked, overrides: Sequence[str]) -> Recipe:
    try:
        recipe = recipes.load(row.recipe, [*overrides, *row.own])
    except UserError as error:
        raise UserError(f"the row {row.name!r}: {error}") from None
    return recipe.model_copy(update={"name": row.name})


def _measured_alike(recipe: Recipe, first: Row) -> tuple[Recipe, list[str]]:
    """With the first row's evaluation; which copy of the towers is measured stays the recipe's own."""
    evaluation = first.recipe.evaluation.model_copy(update={"model": recipe.evaluation.model})
    differs = evaluation != recipe.evaluation
    return recipe.model_copy(update={"evaluation": evaluation}), [f"evaluation as {first.name}"] if differs else []


def _check_sizes(rows: Sequence[Row]) -> None:
    """Images must be equally large, for training and for what is measured."""
    first = rows[0]
    for row in rows[1:]:
        if row.recipe.largest_view != first.recipe.largest_view:
            view = max(row.recipe.views, key=lambda name: row.recipe.views[name].size)
            size = first.recipe.largest_view
            raise UserError(
                f"the largest crops of {row.name!r} have {row.recipe.largest_view} px and those of {first.name!r} "
                f"{size} px; give them one size, as in views.{view}.size={size}"
            )
