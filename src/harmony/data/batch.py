"""What travels from the loader to the objectives: named tensors of one batch of image-caption pairs.

Shapes: B examples, V crops of a view, N patches of a crop, K kept patches, T caption tokens, M masked positions in all.
No label is in here, so that none can reach pre-training, unless an objective of the recipe is supervised and says so
(`Objective.needs_labels`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from harmony.chance import Chance


@dataclass(frozen=True)
class Mask:
    """Positions that an encoder does not get to see.

    Attributes:
        masked: bool, (V, B, N) for patches or (B, T) for words; true where hidden.
        index: (M,) int64, the flat positions of the hidden ones in order, counted where the mask was drawn so that a
            device need not be asked how many there are.
        kept: (V, B, K) int64, positions left, ascending; only for masks that hide equally many patches of every image.
        blocks: (V, B, T, L) int64, the L positions of each of T blocks among the hidden ones, ascending; blocks may
            overlap. Only for masks that are made of blocks to be predicted one by one.
    """

    masked: Tensor
    index: Tensor
    kept: Tensor | None = None
    blocks: Tensor | None = None

    @classmethod
    def of(cls, masked: Tensor, equal_counts: bool = False) -> "Mask":
        """From the boolean tensor alone; `equal_counts` promises that every image hides the same number."""
        kept = None
        if equal_counts:
            visible = int((~masked[0, 0]).sum()) if masked.numel() else 0
            kept = (~masked).nonzero()[:, -1].view(*masked.shape[:-1], visible)
        return cls(masked, masked.flatten().nonzero()[:, 0], kept)

    @classmethod
    def keeping(cls, kept: Tensor, patches: int) -> "Mask":
        """From the places kept, (V, B, K) int64 ascending, of N patches, without asking the device for a count."""
        masked = torch.ones(*kept.shape[:-1], patches, dtype=torch.bool, device=kept.device).scatter(-1, kept, False)
        hidden = masked.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., : patches - kept.shape[-1]]
        first = torch.arange(kept.shape[0] * kept.shape[1], device=kept.device).view(*kept.shape[:-1], 1) * patches
        return cls(masked, (hidden + first).flatten(), kept)

    def share(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(M,): for each hidden position, one over the number hidden in the same image or caption.

        The sum of x * share averages x over the hidden positions of each image, and adds these averages up.
        """
        per_image = self.masked.sum(-1, keepdim=True).clamp(min=1).to(dtype)
        return per_image.reciprocal().expand(self.masked.shape).flatten()[self.index]


@dataclass
class Batch:
    """One step's examples on one rank.

    Attributes:
        keys: the B examples' names, for messages.
        chance: their random streams in this epoch.
        images: view name -> (V, B, 3, S, S); uint8 as loaded, float and normalised once `data.augment` has run.
        boxes: view name -> (V, B, 4) float32, each crop's left, top, width, height as shares of the source image.
        flips: view name -> (V, B) bool, crops mirrored left to right (after cutting).
        photometric: view name -> named tensors, the changes of colour and sharpness still to be made, as drawn by
            `harmony.data.photometric.draw_photometric`.
        captions: stream name -> (B, T) int64 token ids, zero behind the end token; T is the longest caption's length.
        texts: stream name -> the B strings the ids came from.
        masks: mask name -> Mask.
        labels: (B,) int64 class indices, for recipes with a supervised objective; None for all others.
        skipped: (key, reason) of bad examples that were met and replaced while this batch was made.
    """

    keys: list[str]
    chance: Chance
    images: dict[str, Tensor] = field(default_factory=dict)
    boxes: dict[str, Tensor] = field(default_factory=dict)
    flips: dict[str, Tensor] = field(default_factory=dict)
    photometric: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    captions: dict[str, Tensor] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)
    masks: dict[str, Mask] = field(default_factory=dict)
    labels: Tensor | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with every tensor on `device`."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Called by the loader's pinning thread, so that the transfer to a GPU can run beside the computation."""
        return self.map(lambda tensor: tensor.pin_memory())

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with `function` applied to every tensor in it."""
        return replace(self, **{f.name: _apply(getattr(self, f.name), function) for f in fields(self)})


def _apply(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Chance):
        return Chance(function(value.keys))
    if isinstance(value, Mask):
        return Mask(**{f.name: _apply(getattr(value, f.name), function) for f in fields(value)})
    if isinstance(value, dict):
        return {key: _apply(item, function) for key, item in value.items()}
    return value
