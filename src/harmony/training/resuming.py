"""Whether a run may go on from a checkpoint: the same recipe, data and software, as far as they matter."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harmony import ranks, recipe_files
from harmony import recipe as recipes
from harmony.errors import UserError
from harmony.recipe import Recipe
from harmony.training.checkpoints import State, read_state
from harmony.training.run_directory import RunDirectory


def check(run: RunDirectory, checkpoint: Path, recipe: Recipe, force: bool) -> State:
    """The state of a checkpoint, once it is clear that recipe and software are what they were.

    Args:
        run: the run.
        checkpoint: one of its checkpoints.
        recipe: the recipe as it stands in the run's directory now.
        force: accept differences.

    Raises:
        UserError: something that changes results differs; it is named.
    """
    state = read_state(checkpoint)
    _refuse(
        run,
        [*_recipe(recipes.load(checkpoint / "recipe.yaml"), recipe), *_software(state), *_ranks(state, recipe)],
        force,
    )
    return state


def check_data(run: RunDirectory, state: State, data: Mapping[str, Any], force: bool) -> None:
    """Raise UserError when the training data is not what it was.

    Args:
        run: the run.
        state: of its checkpoint.
        data: URI, number of examples and fingerprint of the training data now.
        force: accept differences.
    """
    _refuse(run, list(_data(state.data, data)), force)


def _refuse(run: RunDirectory, differences: list[str], force: bool) -> None:
    if differences and not force:
        raise UserError(
            f"{run.path} cannot go on as it began: {'; '.join(differences)}; "
            "put this back, or add --force to go on anyway"
        )


def without_init(recipe: Recipe) -> Recipe:
    """The recipe without first weights to load, since they come from a checkpoint."""
    frozen = {name: config.model_copy(update={"init": None}) for name, config in recipe.frozen.items()}
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"init": None}), "frozen": frozen})


def load_model(learner: nn.Module, weights: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Load a learner's state dict, all of it.

    Raises:
        UserError: a tensor is missing, left over, or of another shape.
    """
    own = learner.state_dict()
    _check_names("tensors", own, weights, checkpoint)
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            raise UserError(
                f"{checkpoint} holds {name} of shape {tuple(weights[name].shape)} where the recipe wants "
                f"{tuple(tensor.shape)}; use the recipe that it was saved with"
            )
    learner.load_state_dict(weights)


def load_optimiser(optimiser: torch.optim.Optimizer, state: Mapping[str, Any], checkpoint: Path) -> None:
    """Load the optimiser's state, once its groups are seen to hold the same parameters in the same order.

    Raises:
        UserError: they do not.
    """
    own, saved = (
        [group["param_names"] for group in groups] for groups in (optimiser.param_groups, state["param_groups"])
    )
    for mine, theirs in zip_longest(own, saved, fillvalue=()):
        _check_names("trained parameters", mine, theirs, checkpoint)
        if list(mine) != list(theirs):
            raise UserError(f"{checkpoint} orders its parameters otherwise; use the version of harmony that saved it")
    optimiser.load_state_dict(dict(state))


def _check_names(kind: str, wanted: Iterable[str], found: Iterable[str], checkpoint: Path) -> None:
    for fault, names in (("lacks", {*wanted} - {*found}), ("holds, unlike the recipe,", {*found} - {*wanted})):
        if names:
            raise UserError(
                f"{checkpoint} {fault} {len(names)} {kind}, such as {min(names)}; use the recipe that it was saved with"
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
    installed = State(step=0, steps=0, epoch_steps=0, examples=0)
    for package in ("torch", "timm", "open_clip"):
        before, now = (".".join(getattr(each, package).split(".")[:2]) for each in (state, installed))
        if before != now:
            yield f"{package} was {before} and is {now}"


def _ranks(state: State, recipe: Recipe) -> Iterator[str]:
    if recipe.data.chance == "position" and state.ranks != ranks.count():
        yield (
            f"the run had {state.ranks} processes and has {ranks.count()}, and with data.chance=position its random "
            "numbers depend on that"
        )
