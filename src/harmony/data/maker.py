"""How one batch is made from the indices of its examples. A worker process does this.

Shapes: B examples, V crops of a view, S pixels a side of a crop.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from harmony.chance import Chance
from harmony.data.batch import Batch, Mask
from harmony.data.captions import CaptionAugment, Tokenizer
from harmony.data.cutting import Cutter
from harmony.data.decode import Opened
from harmony.data.masks import MaskSampler, PatchSampler
from harmony.data.photometric import augment, draw_photometric
from harmony.data.sources.base import BadExample, Example, Source
from harmony.data.views import ViewConfig
from harmony.errors import UserError
from harmony.schedules import Clock

_OPENED_AT_ONCE = 32
"""Encoded images held at a time, so that a batch of large photographs does not fill the memory; one is decoded."""

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


@dataclass
class _Place:
    """One place of a batch while it is filled.

    Attributes:
        candidates: the examples that may still come here, in order.
        tried: those that were read.
        index, example: the one that was read last.
        bad, skipped: what was refused, as in `Made` and `Batch`.
    """

    candidates: Iterator[int]
    tried: set[int] = field(default_factory=set)
    index: int = -1
    example: Example | None = None
    bad: list[int] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def refuse(self, error: BadExample) -> None:
        self.bad.append(self.index)
        self.skipped.append((error.key, error.reason))

    def let_go(self) -> None:
        """Give the memory of the encoded image back: a batch may be large."""
        if self.example is not None:
            self.example = replace(self.example, image=b"")


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
        cutter = Cutter(chance, self.views)
        examples = self._cut_all(slot, cutter, made)
        batch = made.batch
        batch.keys = [example.key for example in examples]
        batch.images, batch.flips, batch.boxes = cutter.images, cutter.flips, cutter.relative_boxes()
        batch.photometric = {name: draw_photometric(chance, name, view.looks) for name, view in self.views.items()}
        if self.tokenizer:
            batch.texts["caption"] = self._drawn([example.captions for example in examples], chance)
            batch.captions["caption"] = self.tokenizer.encode(batch.texts["caption"])
        if self.labels:
            batch.labels = torch.tensor([example.label for example in examples], dtype=torch.int64)
        clock = Clock(slot.step, self.steps, self.epoch_steps)
        batch.masks = {name: self._mask(name, sampler, batch, clock) for name, sampler in self.masks.items()}
        if self.colours:
            made.batch = augment(batch, self.views, *self.colours)
        return made

    def _cut_all(self, slot: Slot, cutter: Cutter, made: Made) -> list[Example]:
        """Cut the crops of all B examples, others in place of bad ones; those are noted in `made`."""
        places = [_Place(self._candidates(*of)) for of in zip(slot.examples.tolist(), slot.streams, strict=True)]
        try:
            for start in range(0, len(places), _OPENED_AT_ONCE):
                self._cut_part(range(start, min(start + _OPENED_AT_ONCE, len(places))), places, cutter)
        finally:
            for place in places:
                made.bad += place.bad
                made.batch.skipped += place.skipped
        return [place.example for place in places if place.example is not None]

    def _cut_part(self, part: range, places: Sequence["_Place"], cutter: Cutter) -> None:
        """Open some images, place all their crops at once, then decode and cut one image after the other."""
        opened = [self._open(places[number]) for number in part]
        reductions = cutter.place(part, [image.size for image in opened])
        for number, image, reduction in zip(part, opened, reductions, strict=True):
            try:
                cutter.cut(number, image.pixels(reduction), reduction)
            except BadExample as error:
                places[number].refuse(error)
                self._cut_another(number, places[number], cutter)
            places[number].let_go()

    def _cut_another(self, number: int, place: "_Place", cutter: Cutter) -> None:
        """Cut the next candidate of a place that is good to the last pixel."""
        while True:
            image = self._open(place)
            (reduction,) = cutter.place([number], [image.size])
            try:
                return cutter.cut(number, image.pixels(reduction), reduction)
            except BadExample as error:
                place.refuse(error)

    def _candidates(self, index: int, stream: Tensor) -> Iterator[int]:
        """The example asked for, then those drawn in its place."""
        yield index
        yield from Chance(stream[None]).integers("replacement", len(self.source), _REPLACEMENTS)[0].tolist()

    def _open(self, place: "_Place") -> Opened:
        """The image of the next candidate of a place that can be opened."""
        for index in place.candidates:
            place.index = index
            place.tried.add(index)
            try:
                place.example = self.source[index]
                self._require(place.example)
                return Opened(place.example.image, self.max_pixels, place.example.key)
            except BadExample as error:
                place.refuse(error)
        read, everything = len(place.tried), len(self.source)
        which = f"all {everything:,}" if read == everything else f"all {read:,} that were read of the {everything:,}"
        first = "; ".join(f"{key}: {reason}" for key, reason in list(dict.fromkeys(place.skipped))[:3])
        raise UserError(
            f"{which} examples of {self.source.uri} are bad, the first: {first}; see what `harmony data inspect` says "
            "of the data"
        )

    def _require(self, example: Example) -> None:
        if self.tokenizer and not example.captions:
            raise BadExample(example.key, f"has no caption in {self.source.caption_place()}")
        if self.labels and example.label is None:
            raise BadExample(example.key, "has no class")

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
