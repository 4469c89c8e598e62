"""The two towers side by side, and their slow copy."""

import copy
from typing import TypeVar

from torch import nn

from harmony.models.settings import ModelConfig
from harmony.models.text import TextTower
from harmony.models.vision import ImageTower

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Towers(nn.Module):
    """One image tower and, for methods that read captions, one text tower.

    Attributes:
        image: the image tower.
        text: the text tower or None.
        embed: E, width of the space that both project into.
    """

    def __init__(self, config: ModelConfig, size: int) -> None:
        """Build both; `size` is the side in px of the largest view, for towers that leave theirs open."""
        super().__init__()
        self.embed = config.embed
        self.image = ImageTower(config.image, size, config.embed)
        self.text = TextTower(config.text, config.embed) if config.text else None


def slow_copy(module: ModuleT) -> ModuleT:
    """A frozen copy in evaluation mode, for a teacher to keep up to date."""
    return copy.deepcopy(module).eval().requires_grad_(False)
