"""Embeddings of a whole source, extracted once and shared by all tasks.

Shapes: N examples that could be read, b of one batch, E width of the embedding, L last blocks, D width of a token, S
pixels a side.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from harmony.data.decode import MAX_PIXELS, decode
from harmony.data.sources import BadExample, Source
from harmony.data.views import evaluation_crop
from harmony.data.workers import count_workers, start_worker
from harmony.errors import UserError
from harmony.evaluation.encoder import Encoder, Encoding
from harmony.evaluation.progress import say, track
from harmony.evaluation.settings import EvaluationConfig

LAYERS = 4
"""Last blocks whose features are kept, L; all of them when the encoder has fewer."""

BAD_SHOWN = 3
"""Examples that could not be read and are named; all are counted."""


@dataclass
class ImageFeatures:
    """The images of a source, encoded.

    Attributes:
        embeddings: (N, E) float32 on the CPU, of unit length.
        cls: (N, L, D) float32, the class token after each of the last L blocks, the very last one at the end.
        patches: (N, D) float32, the mean of the last block's patch tokens.
        indices: (N,) int64, each example's position in the source.
        labels: (N,) int64, -1 for an example without a label.
        captions: the captions of each example.
        bad: (key, reason) of examples that could not be read; they are left out.
    """

    embeddings: Tensor
    cls: Tensor
    patches: Tensor
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

    def __init__(
        self, encoder: Encoder, source: Source, config: EvaluationConfig, max_pixels: int = MAX_PIXELS
    ) -> None:
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
        crops = Crops(
            self.source,
            spread(len(self.source), self.config.max_examples),
            self.config.size or self.encoder.size,
            self._max_pixels,
        )
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        read = Read()
        for batch in track(self._loader(crops), len(crops), f"encoding {len(crops.positions):,} images"):
            read.add(batch)
            if batch.pixels is not None:
                pixels = self.encoder.normalise(batch.pixels.to(self.encoder.device))
                found.append(_kept(self.encoder.encode(pixels, min(LAYERS, self.encoder.depth))))
        self._tell(read.bad)
        labels = torch.tensor(read.labels, dtype=torch.int64)
        indices = torch.tensor(read.indices, dtype=torch.int64)
        embeddings, cls, patches = (torch.cat(part) for part in zip(*found, strict=True))
        return ImageFeatures(embeddings, cls, patches, indices, labels, read.captions, read.bad)

    def _loader(self, crops: "Crops") -> "DataLoader[Read]":
        size = min(self.config.batch_size, len(crops.positions))
        crops.batch_size = size
        workers = count_workers(self.config.workers, size * 3 * crops.size**2)
        return DataLoader(
            crops,
            batch_size=None,  # the dataset makes whole batches, so that a batch crosses processes as one tensor
            num_workers=min(workers, len(crops) - 1),  # a single batch is made here
            worker_init_fn=start_worker,
        )

    def _tell(self, bad: list[tuple[str, str]]) -> None:
        """Show which examples were left out; UserError when nothing is left."""
        named = "; ".join(f"{key} {reason}" for key, reason in bad[:BAD_SHOWN])
        if len(bad) == len(spread(len(self.source), self.config.max_examples)):
            raise UserError(f"no example of {self.source.uri} can be read: {named or 'it is empty'}; correct the data")
        if bad:
            say(f"{len(bad):,} examples of {self.source.uri} cannot be read and are left out: {named}")


@dataclass
class Read:
    """Examples that were read: those of one batch, with their crops (b, 3, S, S) uint8, or all so far, without."""

    pixels: Tensor | None = None
    indices: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)

    def add(self, other: "Read") -> None:
        """Take over what `other` holds, but for its crops."""
        self.indices += other.indices
        self.labels += other.labels
        self.captions += other.captions
        self.bad += other.bad


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

    def __getitem__(self, batch: int) -> Read:
        if not 0 <= batch < len(self):
            raise IndexError(batch)
        read, pixels = Read(), []
        for index in self.positions[batch * self.batch_size : (batch + 1) * self.batch_size]:
            try:
                example = self.source[index]
                image = decode(example.image, self.max_pixels, example.key)
                pixels.append(evaluation_crop(image, self.size))
            except BadExample as bad:
                read.bad.append((bad.key, bad.reason))
                continue
            read.indices.append(index)
            read.labels.append(-1 if example.label is None else example.label)
            read.captions.append(list(example.captions))
        read.pixels = torch.stack(pixels) if pixels else None
        return read


def _kept(encoding: Encoding) -> tuple[Tensor, Tensor, Tensor]:
    """What is kept of a batch: embeddings, class tokens, mean patches."""
    cls = torch.stack([layer.cls for layer in encoding.layers], dim=1).float().cpu()
    patches = encoding.layers[-1].patches.float().mean(dim=(2, 3)).cpu()
    return _unit(encoding.embedding, "images"), cls, patches


def _unit(embeddings: Tensor, what: str) -> Tensor:
    """Float32, of unit length, on the CPU."""
    embeddings = F.normalize(embeddings.float(), dim=-1).cpu()
    if not embeddings.isfinite().all():
        raise UserError(
            f"the encoder's embeddings of {what} are not finite; its weights are damaged, evaluate another checkpoint"
        )
    return embeddings


def spread(count: int, most: int | None) -> Sequence[int]:
    """At most `most` positions spread evenly over 0 .. count - 1, since sources are often sorted by class."""
    if most is None or most >= count:
        return range(count)
    return [i * count // most for i in range(most)]
