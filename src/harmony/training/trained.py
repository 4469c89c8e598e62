"""What a run has learned, read from its checkpoints: for evaluation, which measures it, and for export."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from harmony import recipe as recipes
from harmony.errors import UserError, unknown
from harmony.interchange.weights import load_completely
from harmony.models.towers import Towers
from harmony.recipe import Recipe
from harmony.training import checkpoints
from harmony.training.run_directory import RunDirectory

MODELS = ("teacher", "student", "untrained")
"""What `--model` may say of a run; untrained is its model as drawn before the first step."""


@dataclass(frozen=True)
class Trained:
    """The towers of a run.

    Attributes:
        name: what messages call it.
        towers: both, on the CPU.
        recipe: what they were trained with.
        objectives: weights of the objectives' own heads by OBJECTIVE.NAME; none for an untrained model.
    """

    name: str
    towers: Towers
    recipe: Recipe
    objectives: dict[str, Tensor] = field(default_factory=dict)

    def contrast(self) -> dict[str, Tensor]:
        """The learned `logit_scale` and `logit_bias` of the first contrastive objective; empty without one."""
        for name, config in self.recipe.objectives.items():
            own = _under(f"{name}.", self.objectives)
            if "logit_scale" in own and not config.weight.is_zero:
                return {key: own[key] for key in ("logit_scale", "logit_bias") if key in own}
        return {}


def read_trained(where: str, model: str | None = None) -> Trained:
    """The towers of a run or of one of its checkpoints.

    Args:
        where: a run directory (its newest checkpoint is taken) or a checkpoint directory.
        model: "teacher", "student" or "untrained"; what its recipe's `evaluation.model` says when None.

    Raises:
        UserError: there is no such run or model, or some weight is missing, left over, of another shape or not finite.
    """
    if model not in (None, *MODELS):
        raise unknown("model", str(model), MODELS)
    checkpoint = find_checkpoint(where)
    recipe = recipes.load(checkpoint / "recipe.yaml")
    model = model or recipe.evaluation.model
    towers = drawn_towers(recipe)
    if model == "untrained":
        return Trained(f"{where} ({model})", towers, recipe)
    weights = checkpoints.read_model(checkpoint)
    load_part(towers, weights, model, str(checkpoint))
    return Trained(f"{where} ({model})", towers, recipe, _under("objectives.", weights))


def drawn_towers(recipe: Recipe) -> Towers:
    """The towers of a run as its seed draws them, before the first step and without `model.init`."""
    torch.manual_seed(recipe.train.seed)
    return Towers(recipe.model, recipe.largest_view)


def find_checkpoint(where: str) -> Path:
    """The checkpoint directory that is meant by a run directory or by itself.

    Raises:
        UserError: there is none.
    """
    path = Path(where)
    if not path.is_dir():
        raise UserError(f"there is no directory {where!r}; name a run directory or one of its checkpoints")
    if (path / "model.safetensors").is_file():
        return path
    latest = RunDirectory(path).latest()
    inside = checkpoints.every(path)
    if latest is None and inside:
        raise UserError(f"{where} holds several checkpoints and is none itself; name the newest, {inside[-1]}")
    if latest is None:
        raise UserError(
            f"{where} holds no checkpoint; name a directory that `harmony train` wrote, or one of its checkpoints"
        )
    return latest


def load_part(module: nn.Module, weights: Mapping[str, Tensor], part: str, where: str) -> None:
    """Load the weights named `part`.* into a module, all of them or none.

    Raises:
        UserError: a weight is missing, left over, of another shape or not finite; names the first few.
    """
    mend = "name a checkpoint that belongs to its recipe"
    load_completely(module, _under(f"{part}.", weights), f"the weights of {part} in {where}", mend)


def _under(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
