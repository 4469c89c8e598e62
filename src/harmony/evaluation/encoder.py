"""What is evaluated: an image encoder and, where there is one, a text encoder that share a space.

Shapes: B images or captions, E shared width, S pixels a side.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from harmony import recipe as recipes
from harmony.data.captions import Tokenizer
from harmony.errors import UserError, unknown
from harmony.models.settings import Colour
from harmony.models.towers import Towers
from harmony.recipe import Recipe
from harmony.training import checkpoints
from harmony.training.run_directory import RunDirectory


class Encoder(ABC):
    """What every task asks of a model, wherever it comes from.

    Attributes:
        name: what messages and results call it.
        size: S, the side in px of the images it takes.
        mean, std: RGB mean and standard deviation that its inputs are normalised with.
        embed: E.
        reads_text: whether it has a text tower.
        device: where it computes.
    """

    name: str
    size: int
    mean: Colour
    std: Colour
    embed: int
    reads_text: bool
    device: torch.device

    @abstractmethod
    def images(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) normalised -> (B, E), not of unit length."""

    @abstractmethod
    def texts(self, texts: Sequence[str]) -> Tensor:
        """B texts -> (B, E), not of unit length."""

    def normalise(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> float32 as the image tower was trained on."""
        mean, std = (torch.tensor(colour, device=pixels.device).view(3, 1, 1) for colour in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std

    def denormalise(self, pixels: Tensor) -> Tensor:
        """The inverse of `normalise`, rounded and kept within 0 .. 255: (..., 3, S, S) uint8."""
        mean, std = (torch.tensor(colour, device=pixels.device).view(3, 1, 1) for colour in (self.mean, self.std))
        return ((pixels * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


class TowersEncoder(Encoder):
    """The towers of a run.

    Attributes:
        towers: both, in evaluation mode.
        recipe: what they were trained with.
    """

    def __init__(self, name: str, towers: Towers, recipe: Recipe, device: torch.device) -> None:
        self.name = name
        self.towers = towers.to(device).eval().requires_grad_(False)
        self.recipe = recipe
        self.device = device
        self.size = recipe.largest_view
        self.mean, self.std = recipe.model.image.mean, recipe.model.image.std
        self.embed = towers.embed
        self.reads_text = towers.text is not None
        text = recipe.model.text
        self._tokenizer = Tokenizer(text.context, text.truncation) if text is not None else None

    @torch.no_grad()
    def images(self, pixels: Tensor) -> Tensor:
        return self.towers.image(pixels)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        if self.towers.text is None or self._tokenizer is None:
            raise UserError(f"{self.name} has no text tower; use a model that was trained on captions")
        return self.towers.text(self._tokenizer.encode(list(texts)).to(self.device))


def load_encoder(where: str, model: str = "teacher", device: torch.device | str | None = None) -> TowersEncoder:
    """The towers of a run or of one of its checkpoints.

    Args:
        where: a run directory (its newest checkpoint is taken) or a checkpoint directory.
        model: "teacher" or "student".
        device: where it computes; a GPU when there is one.

    Raises:
        UserError: there is no such checkpoint, or some weight is missing, left over, of another shape or not finite.
            An encoder whose weights did not load completely is never evaluated.
    """
    if model not in ("teacher", "student"):
        raise unknown("model", model, ("teacher", "student"))
    checkpoint = find_checkpoint(where)
    recipe = recipes.load(checkpoint / "recipe.yaml")
    towers = Towers(recipe.model, recipe.largest_view)
    load_part(towers, checkpoints.read_model(checkpoint), model, str(checkpoint))
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return TowersEncoder(f"{where} ({model})", towers, recipe, chosen)


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
    own = {name.removeprefix(f"{part}."): value for name, value in weights.items() if name.startswith(f"{part}.")}
    expected = module.state_dict()
    faults = [
        ("missing", [name for name in expected if name not in own]),
        ("unexpected", [name for name in own if name not in expected]),
        ("of another shape", [n for n, value in expected.items() if n in own and own[n].shape != value.shape]),
        ("not finite", [name for name, value in own.items() if not value.isfinite().all()]),
    ]
    for fault, names in faults:
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(
                f"the weights of {part} in {where} cannot be used, {fault}: {shown}; "
                "evaluate a checkpoint that belongs to its recipe"
            )
    module.load_state_dict(own)
