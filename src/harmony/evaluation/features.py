"""Embeddings of a whole source, extracted once and shared by all tasks.

Shapes: N examples that could be read, E shared width, S pixels a side.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from harmony.data.decode import decode
from harmony.data.sources import BadExample, Source
from harmony.data.views import evaluation_crop
from harmony.errors import UserError
from harmony.evaluation.encoder import Encoder
from harmony.evaluation.progress import track
from harmony.evaluation.settings import EvaluationConfig


@dataclass(frozen=True)
class ImageFeatures:
    """The images of a source, encoded.

    Attributes:
        embeddings: (N, E) float32 on the CPU, of unit length.
        indices: (N,) int64, each example's position in the source.
        labels: (N,) int64, -1 for an example without a label.
        captions: the captions of each example.
        bad: (key, reason) of examples that could not be read; they are left out.
    """

    embeddings: Tensor
    indices: Tensor
    labels: Tensor
    captions: list[list[str]]
    bad: list[tuple[str, str]]


class Features:
    """What one encoder makes of one source.

    Attributes:
        encoder, source: the two.
        config: batch size, workers, how many examples, and each task's settings.
    """

    def __init__(self, encoder: Encoder, source: Source, config: EvaluationConfig, max_pixels: int | None = None) -> None:
        self.encoder = encoder
        self.source = source
        self.config = config
        self._max_pixels = max_pixels
        self._images: ImageFeatures | None = None

    def images(self) -> ImageFeatures:
        """Embeddings of the images; encoded when first asked for.

        Raises:
            UserError: no example can be read, or the encoder's output is not finite.
        """
        if self._images is None:
            self._images = self._encode_images()
        return self._images

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(len(texts), E) float32 embeddings of unit length; equal texts are read once and share one embedding."""
        places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        # Sorted by length, so that a batch of short captions is not padded to the length of a long one.
        different = sorted(places, key=lambda text: (len(text), text))
        embeddings = torch.empty(len(places), self.encoder.embed)
        size = self.config.batch_size
        batches = [different[start : start + size] for start in range(0, len(different), size)]
        for batch in track(batches, len(batches), f"reading {len(different):,} texts"):
            embeddings[[places[text] for text in batch]] = _unit(self.encoder.texts(batch), "texts")
        return embeddings[[places[text] for text in texts]]

    def _encode_images(self) -> ImageFeatures:
        found = _Found()
        positions = spread(len(self.source), self.config.max_examples)
        crops = _Crops(self.source, positions, self.encoder.size, self._max_pixels)
        loader = DataLoader(
            crops,
            batch_size=self.config.batch_size,
            num_workers=worker_count(self.config.workers, len(positions), self.config.batch_size),
            collate_fn=list,
            pin_memory=False,
        )
        for read in track(loader, len(loader), f"encoding {len(positions):,} images"):
            good = found.take(read)
            if good:
                pixels = torch.stack(good).to(self.encoder.device, non_blocking=True)
                found.embeddings.append(_unit(self.encoder.images(self.encoder.normalise(pixels)), "images"))
        if not found.embeddings:
            reason = f"; the first one: {found.bad[0][0]}, {found.bad[0][1]}" if found.bad else ""
            raise UserError(f"no example of {self.source.uri} can be read{reason}; check the data with `harmony data inspect`")
        return found.features()


@dataclass(frozen=True)
class _Read:
    """One example as it comes from a worker: the crop (3, S, S) uint8, or the reason why there is none."""

    index: int
    pixels: Tensor | None
    label: int = -1
    captions: list[str] = field(default_factory=list)
    bad: tuple[str, str] = ("", "")


class _Crops(Dataset[_Read]):
    def __init__(self, source: Source, positions: Tensor, size: int, max_pixels: int | None) -> None:
        self.source = source
        self.positions = positions
        self.size = size
        self.limit = {} if max_pixels is None else {"max_pixels": max_pixels}

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, place: int) -> _Read:
        index = int(self.positions[place])
        try:
            example = self.source[index]
            pixels = evaluation_crop(decode(example.image, **self.limit), self.size)
        except BadExample as bad:
            return _Read(index, None, bad=(self.source.key(index), str(bad)))
        return _Read(index, pixels, -1 if example.label is None else example.label, example.captions)


class _Found:
    """What has been read so far."""

    def __init__(self) -> None:
        self.embeddings: list[Tensor] = []
        self.good: list[_Read] = []
        self.bad: list[tuple[str, str]] = []

    def take(self, read: list[_Read]) -> list[Tensor]:
        """Note a batch, and give the crops of the examples that are good."""
        self.bad += [example.bad for example in read if example.pixels is None]
        self.good += [_Read(r.index, None, r.label, r.captions) for r in read if r.pixels is not None]
        return [example.pixels for example in read if example.pixels is not None]

    def features(self) -> ImageFeatures:
        return ImageFeatures(
            torch.cat(self.embeddings),
            torch.tensor([example.index for example in self.good]),
            torch.tensor([example.label for example in self.good]),
            [example.captions for example in self.good],
            self.bad,
        )


def _unit(embeddings: Tensor, what: str) -> Tensor:
    """Float32, of unit length, on the CPU."""
    embeddings = F.normalize(embeddings.float(), dim=-1).cpu()
    if not embeddings.isfinite().all():
        raise UserError(f"the encoder's embeddings of {what} are not finite; its weights are damaged, evaluate another checkpoint")
    return embeddings


def spread(count: int, most: int | None) -> Tensor:
    """(min(count, most),) positions spread evenly over 0 .. count - 1, since sources are often sorted by class."""
    if most is None or most >= count:
        return torch.arange(count)
    return torch.arange(most) * count // most


def worker_count(workers: int | str, examples: int, batch_size: int) -> int:
    """Loader processes: as many as asked for, or one a core but not more than there are batches (none for a single one)."""
    if isinstance(workers, int):
        return workers
    batches = -(-examples // batch_size)
    return 0 if batches <= 1 else min(len(os.sched_getaffinity(0)), batches, 16)


def crops_at(source: Source, indices: Sequence[int], size: int) -> Iterator[tuple[int, Tensor]]:
    """(index, (3, S, S) uint8) of those of the examples that can be read; for pictures."""
    crops = _Crops(source, torch.tensor(list(indices), dtype=torch.int64), size, None)
    for place in range(len(crops)):
        read = crops[place]
        if read.pixels is not None:
            yield read.index, read.pixels
