"""How one batch is made from the indices of its examples. A worker process does this.

Shapes: B examples, V crops of a view, S pixels a side of a crop.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from harmony.chance import Chance
from harmony.data.batch import Batch, Mask
from harmony.data.captions import CaptionAugment, Tokenizer
from harmony.data.decode import decode
from harmony.data.masks import MaskSampler, PatchSampler
from harmony.data.photometric import augment, draw_photometric
from harmony.data.sources.base import BadExample, Example, Source
from harmony.data.views import Crops, ViewConfig, cut_views
from harmony.errors import UserError
from harmony.schedules import Clock

_DECODED_AT_ONCE = 16
"""Images held decoded at a time, so that a batch of large photographs does not fill the memory."""

_REPLACEMENTS = 1000
"""Examples tried in place of a bad one; if all of these are bad too, so is the data."""


@dataclass(frozen=True)
class Slot:
    """One batch to be made.

    Attributes:
        step: optimiser steps done before it.
        examples: (B,) int64, indices into the source.
        streams: (B,) int64, keys of their chance.
    """

    step: int
    examples: Tensor
    streams: Tensor


@dataclass
class Made:
    """What comes back from a worker.

    Attributes:
        batch: the batch, incomplete when there is an error.
        examples: (B,) int64, the indices that were asked for.
        bad: indices of the bad examples met, both of those and of their replacements.
        error: a message for the user, when no batch can be made.
    """

    batch: Batch
    examples: Tensor
    bad: list[int] = field(default_factory=list)
    error: str | None = None

    def pin_memory(self) -> "Made":
        """Called by the loader's pinning thread."""
        return replace(self, batch=self.batch.pin_memory())


@dataclass(frozen=True)
class BatchMaker:
    """Makes batches; the same slot always gives the same batch.

    Attributes:
        source: where examples are read.
        views: what is cut from each image.
        tokenizer: what turns captions into ids; None when captions are not wanted.
        masks: what is drawn, by mask name.
        grids: view name -> (rows, columns) of patches.
        max_pixels: largest image decoded.
        steps, epoch_steps: length of the run and of an epoch, for the clock of masks.
        colours: (mean, std) when colours are changed and pixels normalised here, None when the device does it.
        labels: whether batches have labels.
        caption_augment: how the words of captions are changed, None when they are not.
    """

    source: Source
    views: Mapping[str, ViewConfig]
    tokenizer: Tokenizer | None
    masks: Mapping[str, MaskSampler]
    grids: Mapping[str, tuple[int, int]]
    max_pixels: int
    steps: int
    epoch_steps: int
    colours: tuple[Sequence[float], Sequence[float]] | None
    labels: bool = False
    caption_augment: CaptionAugment | None = None

    def __getitem__(self, slot: Slot) -> Made:
        made = Made(Batch(keys=[], chance=Chance(slot.streams)), slot.examples)
        try:
            return self.make(slot, made)
        except UserError as error:  # its message must reach the user as it is, not wrapped in a worker's traceback
            bad = list(dict.fromkeys(made.batch.skipped))
            return Made(Batch(keys=[], chance=Chance(slot.streams), skipped=bad), slot.examples, error=str(error))

    def make(self, slot: Slot, made: Made) -> Made:
        """Fill `made` with one batch.

        Raises:
            UserError: an example and 1000 others drawn in its place are all bad.
        """
        chance = Chance(slot.streams)
        captions: list[list[str]] = []
        labels: list[int | None] = []
        crops: list[Crops] = []
        for start in range(0, len(slot.examples), _DECODED_AT_ONCE):
            part = range(start, min(start + _DECODED_AT_ONCE, len(slot.examples)))
            images = []
            for place in part:
                example, pixels = self._good_example(int(slot.examples[place]), chance.keys[place : place + 1], made)
                made.batch.keys.append(example.key)
                captions.append(example.captions)
                labels.append(example.label)
                images.append(pixels)
            crops.append(cut_views(images, Chance(chance.keys[part.start : part.stop]), self.views))
        batch = made.batch
        batch.images = {name: torch.cat([some.images[name] for some in crops], 1) for name in self.views}
        batch.boxes = {name: torch.cat([some.boxes[name] for some in crops], 1) for name in self.views}
        batch.flips = {name: torch.cat([some.flips[name] for some in crops], 1) for name in self.views}
        batch.photometric = {name: draw_photometric(chance, name, view.looks) for name, view in self.views.items()}
        if self.tokenizer:
            batch.texts["caption"] = self._drawn(captions, chance)
            batch.captions["caption"] = self.tokenizer.encode(batch.texts["caption"])
        if self.labels:
            batch.labels = torch.tensor(labels, dtype=torch.int64)
        clock = Clock(slot.step, self.steps, self.epoch_steps)
        batch.masks = {name: self._mask(name, sampler, batch, clock) for name, sampler in self.masks.items()}
        if self.colours:
            made.batch = augment(batch, self.views, *self.colours)
        return made

    def _good_example(self, index: int, stream: Tensor, made: Made) -> tuple[Example, Tensor]:
        """The example and its pixels, or those of another one when it is bad, which is noted in `made`."""
        candidates = [index]
        for tried in range(_REPLACEMENTS + 1):
            try:
                return self._read(candidates[tried])
            except BadExample as error:
                made.bad.append(candidates[tried])
                made.batch.skipped.append((error.key, error.reason))
            if tried == 0:
                candidates += Chance(stream).integers("replacement", len(self.source), _REPLACEMENTS)[0].tolist()
        read, everything = len(set(candidates)), len(self.source)
        which = f"all {everything:,}" if read == everything else f"all {read:,} that were read of the {everything:,}"
        skipped = dict.fromkeys(made.batch.skipped[-len(candidates) :])
        first = "; ".join(f"{key}: {reason}" for key, reason in list(skipped)[:3])
        raise UserError(
            f"{which} examples of {self.source.uri} are bad, the first: {first}; see what `harmony data inspect` says "
            "of the data"
        )

    def _read(self, index: int) -> tuple[Example, Tensor]:
        example = self.source[index]
        if self.tokenizer and not example.captions:
            raise BadExample(example.key, f"has no caption in {self.source.caption_place()}")
        if self.labels and example.label is None:
            raise BadExample(example.key, "has no class")
        return example, decode(example.image, self.max_pixels, example.key)

    def _drawn(self, captions: Sequence[list[str]], chance: Chance) -> list[str]:
        """One of each example's captions, its words changed when that is wanted."""
        counts = torch.tensor([len(several) for several in captions])
        drawn = chance.integers("caption", counts).tolist()
        chosen = [several[one] for several, one in zip(captions, drawn, strict=True)]
        return self.caption_augment.apply(chosen, chance) if self.caption_augment else chosen

    def _mask(self, name: str, sampler: MaskSampler, batch: Batch, clock: Clock) -> Mask:
        if isinstance(sampler, PatchSampler):
            crops = self.views[sampler.view].count
            return sampler.draw(name, batch.chance, crops, self.grids[sampler.view], clock)
        return sampler.draw(name, batch.chance, batch.captions[sampler.stream], clock)
