"""Models that are given and never change, whose features serve objectives as targets."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from harmony.models.encodings import ImageEncoding
from harmony.models.settings import Colour, ImageConfig
from harmony.models.vision import ImageTower, Segment


class FrozenTower(ImageTower):
    """An image tower that takes images normalised for another one, and normalises them as it was trained with.

    It has no mask token and projects nowhere: what it gives are its own features.
    """

    factor: Tensor
    offset: Tensor

    def __init__(self, config: ImageConfig, size: int, mean: Colour, std: Colour) -> None:
        """Build untrained.

        Args:
            config: its settings.
            size: side in px that the learned positions are made for, where the settings leave it open.
            mean: RGB mean that the images it is given have been normalised with.
            std: RGB standard deviation likewise.
        """
        super().__init__(config, size, embed=1)
        del self.mask_token
        self.proj = nn.Identity()  # type: ignore[assignment]
        own_mean, own_std = torch.tensor(config.mean).view(3, 1, 1), torch.tensor(config.std).view(3, 1, 1)
        self.same_colours = (config.mean, config.std) == (mean, std)
        # Pixels x were made (x - mean) / std and shall be (x - own mean) / own std.
        self.register_buffer("factor", torch.tensor(std).view(3, 1, 1) / own_std, persistent=False)
        self.register_buffer("offset", (torch.tensor(mean).view(3, 1, 1) - own_mean) / own_std, persistent=False)

    def encode_packed(self, segments: Sequence[Segment]) -> list[ImageEncoding]:
        """As every tower does, on the images in its own colours."""
        if not self.same_colours:
            segments = [replace(one, pixels=one.pixels * self.factor + self.offset) for one in segments]
        return super().encode_packed(segments)


class FrozenModel(nn.Module):
    """A frozen image tower where the plan expects towers; it reads no captions."""

    text: None = None

    def __init__(self, image: FrozenTower) -> None:
        super().__init__()
        self.image = image
        self.eval().requires_grad_(False)
