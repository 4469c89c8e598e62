"""The loader: counted, so that any batch of a run can be made at once, and the same whoever makes it.

In each epoch the examples come in an order that is a function of (seed, epoch). Of that order, each step takes the next
`batch_size` examples; what is left at the end of an epoch is dropped. A step's examples are cut into `accumulate`
parts, each part into one slice a rank, so the slices of all ranks, joined, are the batch of a single process.

Shapes: B examples of one part on one rank, N examples in all.
"""

import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from harmony.chance import Chance
from harmony.data.batch import Batch
from harmony.data.captions import Tokenizer
from harmony.data.maker import BatchMaker, Made, Slot
from harmony.data.masks import MaskSampler, PatchSampler
from harmony.data.sending import Sender
from harmony.data.settings import DataConfig
from harmony.data.sources.base import Source
from harmony.data.views import ViewConfig
from harmony.data.workers import AHEAD, allow_open_files, count_workers, start_worker
from harmony.errors import UserError, unknown

JUDGED_AFTER = 1000
"""Examples of which the bad ones may be `max_bad_share` before the run stops (all of them when there are fewer)."""


class PairLoader:
    """The batches of a run.

    Args:
        source: the examples.
        data: the recipe's settings.
        views: what is cut from each image, by view name.
        tokenizer: what reads the captions; None when the objectives want no captions.
        masks: what is drawn besides, by mask name.
        patch: pixels a side of the image tower's patches.
        mean, std: what pixels are normalised with, where `augment` is "worker".
        seed: of the order and of every example's chance.
        steps: optimiser steps of the whole run.
        accumulate: parts a step's batch is cut into.
        augment: whether colours are changed and pixels normalised by the workers, or left to the device.
        rank, ranks: which slice of each part is made here, and of how many.
        device: where batches go; to a GPU they are sent from pinned memory while it computes, elsewhere they stay here.
        labels: whether batches have labels, which only a supervised objective asks for.

    Attributes:
        epoch_steps: optimiser steps an epoch.
        seen, bad: distinct examples met since this loader began, and how many of them were bad.
        refused: (key, reason) of the bad examples met while the newest batch was made, also when it ended the run.
        workers: processes that make batches, 0 for none.

    Raises:
        UserError: the settings do not fit the data or each other.
    """

    def __init__(
        self,
        source: Source,
        data: DataConfig,
        views: Mapping[str, ViewConfig],
        tokenizer: Tokenizer | None,
        masks: Mapping[str, MaskSampler],
        patch: int,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        steps: int,
        accumulate: int = 1,
        augment: Literal["worker", "device"] = "worker",
        rank: int = 0,
        ranks: int = 1,
        device: torch.device | str = "cpu",
        labels: bool = False,
    ) -> None:
        self.epoch_steps = epoch_steps(len(source), data.batch_size, source.uri)
        _check_parts(data.batch_size, ranks, accumulate)
        _check_masks(masks, views, tokenizer)
        grids = {name: grid_of(name, view.size, patch) for name, view in views.items()}
        if tokenizer:
            source.require_captions()
        if labels:
            source.require_labels()
        self.data, self.seed, self.steps, self.accumulate = data, seed, steps, accumulate
        self.rank, self.ranks = rank, ranks
        self.part = data.batch_size // ranks // accumulate
        self._pinned = torch.device(device).type == "cuda"
        self._sender = Sender(torch.device(device)) if self._pinned else None
        self._maker = BatchMaker(
            source=source,
            views=dict(views),
            tokenizer=tokenizer,
            masks=dict(masks),
            grids=grids,
            max_pixels=data.max_pixels,
            steps=steps,
            epoch_steps=self.epoch_steps,
            colours=(tuple(mean), tuple(std)) if augment == "worker" else None,
            labels=labels,
            caption_augment=data.caption_augment,
        )
        self.workers = count_workers(data.workers, self._batch_bytes())
        self.seen = self.bad = 0
        self._seen, self._bad = (torch.zeros(len(source), dtype=torch.bool) for _ in range(2))
        self.refused: list[tuple[str, str]] = []
        self._reasons: list[str] = []
        self._order: tuple[int, Tensor] | None = None

    @property
    def source(self) -> Source:
        return self._maker.source

    def batches(self, start_step: int = 0) -> Generator[Batch]:
        """This rank's batches from step `start_step` to the end of the run, the parts of a step one after the other.

        Raises:
            UserError: more than `max_bad_share` of the examples are bad.
            RuntimeError: a worker died.
        """
        slots = (self.slot(step, part) for step in range(start_step, self.steps) for part in range(self.accumulate))
        for made in self._from_workers(slots) if self.workers else self._from_here(slots):
            self.refused = made.batch.skipped
            if made.error is not None:
                raise UserError(made.error)
            self._count(made)
            yield self._sender.send(made.batch) if self._sender else made.batch

    def _from_here(self, slots: Iterable[Slot]) -> Iterator[Made]:
        for slot in slots:
            with _one_thread():
                made = self._maker[slot]
            yield made.pin_memory() if self._pinned else made

    def _from_workers(self, slots: Iterable[Slot]) -> Iterator[Made]:
        allow_open_files(self.workers)
        # One pass of the DataLoader is the whole run, so its workers live as long, through all epochs.
        loader: DataLoader[Made] = DataLoader(
            self._maker,  # type: ignore[arg-type]  # anything with __getitem__ will do
            batch_size=None,
            sampler=slots,
            num_workers=self.workers,
            collate_fn=_as_it_is,
            pin_memory=self._pinned,
            prefetch_factor=AHEAD,
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # else it draws a seed nobody needs from the process's own generator
        )
        try:
            yield from loader
        except RuntimeError as error:
            if re.search(r"DataLoader worker .*(exited unexpectedly|killed by signal)", str(error)):
                raise RuntimeError(
                    "a data worker was killed, most often because memory or /dev/shm is full; "
                    f"lower data.workers (now {self.workers}) or data.batch_size"
                ) from error
            raise

    def slot(self, step: int, part: int) -> Slot:
        """Which examples are part `part` of step `step` on this rank, and their chance."""
        epoch, inside = divmod(step, self.epoch_steps)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self.order(epoch)
        start = inside * self.data.batch_size + (part * self.ranks + self.rank) * self.part
        examples = self._order[1][start : start + self.part]
        if self.data.chance == "position":
            chance = Chance.of_examples(self.seed, step, torch.arange(part * self.part, (part + 1) * self.part))
        else:
            chance = Chance.of_examples(self.seed, epoch, examples)
        return Slot(step, examples.clone(), chance.keys)  # a slice would take the whole order along to the worker

    def order(self, epoch: int) -> Tensor:
        """(N,) int64, the order of the examples in one epoch."""
        everything = torch.arange(len(self.source))
        if not self.data.shuffle:
            return everything
        return Chance.of_examples(self.seed, epoch, everything).branches(["order"]).keys.argsort(stable=True)

    def _count(self, made: Made) -> None:
        """Count what a batch met, and stop the run when the data is too bad."""
        bad = torch.tensor(made.bad, dtype=torch.int64)
        self.seen += _mark(self._seen, torch.cat([made.examples, bad]))
        self.bad += _mark(self._bad, bad)
        self._reasons += [f"{key}: {reason}" for key, reason in made.batch.skipped[: 3 - len(self._reasons)]]
        allowed = self.data.max_bad_share * max(self.seen, min(JUDGED_AFTER, len(self.source)))
        if made.bad and self.bad > allowed:
            raise UserError(
                f"{self.bad} of the {self.seen} examples read from {self.source.uri} are bad, more than "
                f"data.max_bad_share={self.data.max_bad_share:g} allows; the first: {'; '.join(self._reasons)}"
            )

    def _batch_bytes(self) -> int:
        values = sum(view.count * self.part * 3 * view.size**2 for view in self._maker.views.values())
        return values * (4 if self._maker.colours else 1)


def epoch_steps(examples: int, batch_size: int, uri: str) -> int:
    """Optimiser steps in one pass over the data, the last incomplete batch dropped; UserError when there is none."""
    if batch_size > examples:
        raise UserError(f"data.batch_size is {batch_size}, but {uri} has only {examples} examples; use a smaller batch")
    return examples // batch_size


def grid_of(view: str, size: int, patch: int) -> tuple[int, int]:
    """Rows and columns of patches in a view's crops; UserError when patches do not fill them."""
    if size < patch or size % patch:
        near = max(patch, round(size / patch) * patch)
        raise UserError(
            f"view {view!r} has crops of {size} px, which is not a multiple of the model's patch of {patch} px; "
            f"use views.{view}.size={near}"
        )
    return size // patch, size // patch


def _check_parts(batch_size: int, ranks: int, accumulate: int) -> None:
    if batch_size % (ranks * accumulate):
        parts = f"{ranks} ranks times train.accumulate={accumulate}" if ranks > 1 else f"train.accumulate={accumulate}"
        near = max(1, round(batch_size / (ranks * accumulate))) * ranks * accumulate
        raise UserError(f"data.batch_size={batch_size} cannot be cut into {parts} equal parts; use {near}")


def _check_masks(
    masks: Mapping[str, MaskSampler], views: Mapping[str, ViewConfig], tokenizer: Tokenizer | None
) -> None:
    for name, sampler in masks.items():
        if isinstance(sampler, PatchSampler):
            if sampler.view not in views:
                raise unknown(f"view of the mask {name!r}:", sampler.view, views)
        elif tokenizer is None:
            raise UserError(f"the mask {name!r} hides words, but no captions are read; the model needs a text tower")


def _mark(flags: Tensor, indices: Tensor) -> int:
    """Set the flags (N,) bool at `indices`, and say how many of them were not set before."""
    new = indices.unique()
    new = new[~flags[new]]
    flags[new] = True
    return len(new)


def _as_it_is(made: Any) -> Any:
    return made


@contextmanager
def _one_thread() -> Iterator[None]:
    """As in a worker, because sums over several threads may round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
