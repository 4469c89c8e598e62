"""The batches of a training, each a function of its step alone."""

import re
from collections.abc import Iterator, Sequence
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from harmony import ranks
from harmony.data.decode import decode
from harmony.data.sources import BadExample, Source
from harmony.data.workers import AHEAD, allow_open_files, count_workers, start_worker
from harmony.errors import UserError
from harmony.evaluation.progress import say
from harmony.evaluation.seeds import generator, seeded
from harmony.evaluation.settings.base import FitConfig
from harmony.training.distributed import TrainingError

BatchT = TypeVar("BatchT")


def read_again(source: Source, position: int, max_pixels: int) -> Tensor:
    """(3, H, W) uint8, an image that could be read before the training.

    Raises:
        UserError: it cannot be read any more.
    """
    try:
        example = source[position]
        return decode(example.image, max_pixels, example.key)
    except BadExample as bad:
        raise UserError(
            f"{bad.key} of {source.uri} {bad.reason}, although it could be read before; correct the data"
        ) from None


class Batches(Dataset[BatchT], Generic[BatchT]):
    """The batches of a training, each a function of its step alone.

    A subclass says how many examples there are and makes one rank's share of a batch; order, ranks and chance are here.
    What does not fill a batch at the end of an epoch is left out; every epoch has another order.

    Args:
        examples: how many training examples there are.
        config: batch size, length, seed.

    Attributes:
        example_bytes: about what an example takes in a batch; a subclass may know better. It decides how many workers
            the memory between processes has room for.
        multiple: a rank's share of a batch is a multiple of this many examples.
        batch_size: examples of a batch, over all ranks.
        steps, epoch_steps: of the whole training and of an epoch.

    Raises:
        UserError: there are too few examples, or the batch cannot be divided among the ranks.
    """

    example_bytes = 3 * 256 * 256
    multiple = 1

    def __init__(self, examples: int, config: FitConfig) -> None:
        self.examples = examples
        self.config = config
        self._rank, self._ranks = ranks.rank(), ranks.count()
        self.batch_size = self._fitting_batch()
        self.epoch_steps = examples // self.batch_size
        self.steps = config.steps or max(1, round(config.epochs * self.epoch_steps))
        self._order: tuple[int, Tensor] | None = None

    def make(self, positions: Sequence[int]) -> BatchT:
        """The examples at `positions` of 0 .. examples - 1, augmented; draws from the global generators."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> BatchT:
        """This rank's share of the batch of a step counted from 0."""
        epoch, place = divmod(step, self.epoch_steps)
        if self._order is None or self._order[0] != epoch:
            chance = generator("order", self.config.seed, epoch)
            self._order = epoch, torch.randperm(self.examples, generator=chance)
        batch = self._order[1][place * self.batch_size : (place + 1) * self.batch_size]
        share = self.batch_size // self._ranks
        with seeded("batch", self.config.seed, step, self._rank):
            return self.make(batch[self._rank * share : (self._rank + 1) * share].tolist())

    def from_step(self, start: int, workers: int | Literal["auto"], device: torch.device) -> Iterator[BatchT]:
        """The batches from step `start` to the end, made by worker processes."""
        share = self.batch_size // self._ranks
        wanted = count_workers(workers, share * self.example_bytes)
        count = min(wanted, max(0, self.steps - start - 1))  # a single batch is made here
        allow_open_files(count)
        loader: DataLoader[BatchT] = DataLoader(
            self,
            batch_size=None,  # an item is a whole batch
            sampler=range(start, self.steps),
            num_workers=count,
            prefetch_factor=AHEAD if count else None,
            worker_init_fn=start_worker,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # else it draws a seed nobody needs from the process's own generator
        )
        try:
            yield from loader
        except UserError as error:  # of a worker it comes with the worker's traceback around it
            raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None
        except RuntimeError as error:
            if re.search(r"DataLoader worker .*(exited unexpectedly|killed by signal)", str(error)):
                raise TrainingError(
                    "a worker process was killed, most often because memory or /dev/shm is full; "
                    f"lower workers (now {count}) or train_batch_size"
                ) from error
            raise

    def _fitting_batch(self) -> int:
        """The batch that is asked for, or as much of it as there are examples for."""
        asked, multiple = self.config.train_batch_size, self._ranks * self.multiple
        most = self.examples // multiple * multiple
        if not most:
            raise UserError(
                f"training examples: {self.examples}, but a step needs at least {multiple}; add data"
                + (" or start fewer processes" if self._ranks > 1 else "")
            )
        if asked > most:
            if ranks.is_main():
                say(f"train_batch_size {asked} is more than there is to learn from; a batch has {most} examples")
            return most
        if asked % multiple:
            why = f"{self._ranks} processes" + (f", {self.multiple} at a time" if self.multiple > 1 else "")
            why = why if self._ranks > 1 else f"groups of {self.multiple}"
            raise UserError(
                f"a batch of {asked} cannot be divided among {why}; set train_batch_size to a multiple of {multiple}"
            )
        return asked
