"""Whether a run may go on from a checkpoint: the same recipe, data and software, as far as they matter."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmony import recipe as recipes
from harmony import recipe_files
from harmony.errors import UserError
from harmony.recipe import Recipe
from harmony.training.checkpoints import State, read_state
from harmony.training.run_directory import RunDirectory


def check(run: RunDirectory, checkpoint: Path, recipe: Recipe, data: Mapping[str, Any], force: bool) -> State:
    """The state of the checkpoint, once it is clear that going on from it continues the same run.

    Args:
        run: the run.
        checkpoint: one of its checkpoints.
        recipe: the recipe as it stands in the run's directory now.
        data: URI, number of examples and fingerprint of the training data now.
        force: go on despite differences.

    Raises:
        UserError: something that changes results differs; it is named.
    """
    state = read_state(checkpoint)
    before = recipes.load(checkpoint / "recipe.yaml")
    found = [*_recipe(before, recipe), *_data(state.data, data), *_software(state)]
    if found and not force:
        raise UserError(
            f"{run.path} cannot go on as it began: {'; '.join(found)}. Put this back, or add --force to go on anyway"
        )
    return state


def without_init(recipe: Recipe) -> Recipe:
    """The recipe without first weights to load: they come from a checkpoint."""
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"init": None})})


def check_names(kind: str, expected: Mapping[str, object], found: Mapping[str, object], checkpoint: Path) -> None:
    """Raise UserError when a checkpoint's tensors are not those that the recipe builds."""
    for label, names in (("lacks", expected.keys() - found.keys()), ("has, unlike the recipe,", found.keys() - expected.keys())):
        if names:
            raise UserError(
                f"{checkpoint} {label} {len(names)} {kind}, such as {min(names)!r}; use the recipe that it was saved with"
            )


def check_shapes(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Raise UserError when a tensor of a checkpoint has another shape than the recipe builds."""
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            raise UserError(
                f"{checkpoint} holds {name!r} with shape {tuple(found[name].shape)}, but the recipe builds "
                f"{tuple(tensor.shape)}; use the recipe that it was saved with"
            )


def _recipe(before: Recipe, now: Recipe) -> Iterator[str]:
    old, new = (dict(recipe_files.flat(recipe.to_dict())) for recipe in (before, now))
    for key in recipes.differences(before, now):
        yield f"{key} in recipe.yaml was {old.get(key, 'not there')} and is {new.get(key, 'not there')}"


def _data(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    if before["fingerprint"] == now["fingerprint"]:
        return
    if before["examples"] != now["examples"]:
        yield f"the data at {now['uri']} had {before['examples']} examples and has {now['examples']}"
    else:
        yield f"the data at {now['uri']} changed (still {now['examples']} examples, but other names or sizes)"


def _software(state: State) -> Iterator[str]:
    before, now = (".".join(text.split(".")[:2]) for text in (state.torch, torch.__version__))
    if before != now:
        yield f"torch was {before} and is {now}"
