"""Examples read for evaluation: which of a source, cut to their central squares, and those that cannot be read.

Shapes: b examples of a batch, S pixels a side.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from harmony.data.decode import MAX_PIXELS, decode
from harmony.data.sources import BadExample, Example, Source
from harmony.data.views import evaluation_crop
from harmony.errors import UserError
from harmony.evaluation.progress import BAD_SHOWN, say_left_out


@dataclass
class Read:
    """Examples that were read: those of one batch, with their crops (b, 3, S, S) uint8, or all so far, without."""

    pixels: Tensor | None = None
    indices: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    bad_indices: list[int] = field(default_factory=list)

    def pin_memory(self) -> "Read":
        """With its crops in memory that a GPU fetches by itself; what a DataLoader calls."""
        return self if self.pixels is None else replace(self, pixels=self.pixels.pin_memory())

    def add(self, other: "Read") -> None:
        """Take over what `other` holds, but for its crops."""
        self.indices += other.indices
        self.labels += other.labels
        self.captions += other.captions
        self.bad += other.bad
        self.bad_indices += other.bad_indices


class Crops(Dataset[Read]):
    """Batches of examples, read and cut to the central square as for evaluation.

    Args:
        source: the examples.
        positions: which of them, in this order.
        size: S.
        max_pixels: images with more pixels count as bad.
        batch_size: examples a batch.
    """

    def __init__(
        self, source: Source, positions: Sequence[int], size: int, max_pixels: int = MAX_PIXELS, batch_size: int = 1
    ) -> None:
        self.source = source
        self.positions = positions
        self.size = size
        self.max_pixels = max_pixels
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.positions) // self.batch_size)

    def __getitem__(self, batch: int | slice) -> Read:
        """A batch by its number, or the examples at a range of `positions`."""
        if isinstance(batch, int):
            if not 0 <= batch < len(self):
                raise IndexError(batch)
            batch = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
        read, pixels = Read(), []
        for index in self.positions[batch]:
            try:
                example, crop = self._read(index)
            except BadExample as bad:
                read.bad.append((bad.key, bad.reason))
                read.bad_indices.append(index)
                continue
            pixels.append(crop)
            read.indices.append(index)
            read.labels.append(-1 if example.label is None else example.label)
            read.captions.append(list(example.captions))
        read.pixels = torch.stack(pixels) if pixels else None
        return read

    def _read(self, index: int) -> tuple[Example, Tensor]:
        example = self.source[index]
        return example, evaluation_crop(decode(example.image, self.max_pixels, example.key), self.size)

    def some_readable(self, indices: Iterable[int]) -> bool:
        """Whether an example that could not be read can be now: a disk that did not answer may be back."""
        for index in indices:
            with suppress(BadExample):
                self._read(index)
                return True
        return False


def tell_bad(uri: str, bad: Sequence[tuple[str, str]], examples: int, what: str = "read") -> None:
    """Show which examples were left out, as (key, reason); UserError when nothing is left."""
    named = "; ".join(f"{key} {reason}" for key, reason in bad[:BAD_SHOWN])
    if len(bad) == examples:
        raise UserError(f"no example of {uri} can be {what}: {named or 'it is empty'}; correct the data")
    say_left_out(uri, bad, what)


def spread(count: int, most: int | None) -> Sequence[int]:
    """At most `most` positions spread evenly over 0 .. count - 1, since sources are often sorted by class."""
    if most is None or most >= count:
        return range(count)
    return [i * count // most for i in range(most)]
