"""Embeddings of a whole source, extracted once, kept on disk (`store`) and shared by all tasks.

Shapes: N examples that could be read, b of one batch, E width of the embedding, L last blocks, D width of a token, S
pixels a side.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from harmony import ranks
from harmony.data.decode import MAX_PIXELS
from harmony.data.sources import Source
from harmony.data.workers import count_workers, start_worker
from harmony.errors import UserError
from harmony.evaluation.crops import Crops, Read, spread, tell_bad
from harmony.evaluation.encoder import Encoder, Encoding
from harmony.evaluation.progress import track
from harmony.evaluation.settings import EvaluationConfig
from harmony.evaluation.store import Shard, Store, hash_of, packed, spans, unpacked
from harmony.training.distributed import together

ItemT = TypeVar("ItemT")

LAYERS = 4
"""Last blocks whose features are kept, L; all of them when the encoder has fewer."""

_CROP = "the central square, its side resized by antialiased bicubic interpolation"


class ImageFeatures:
    """The images of a source, encoded.

    Everything is in shards that are mapped from disk, and read when it is looked at. An attribute joins its part of all
    shards when first asked for, which takes memory where there are several; `shards` lets a task go through them.

    Args:
        shards: embeddings, cls, patches, indices, labels as below, and captions, bad and bad_indices (of examples that
            could not be read); captions and bad are JSON (`store.packed`).

    Attributes:
        shards: as given.
        embeddings: (N, E) float32 on the CPU, of unit length.
        cls: (N, L, D) float32, the class token after each of the last L blocks, the very last one at the end.
        patches: (N, D) float32, the mean of the last block's patch tokens.
        indices: (N,) int64, each example's position in the source.
        labels: (N,) int64, -1 for an example without a label.
        captions: the captions of each example.
        bad: (key, reason) of examples that could not be read; they are left out.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = shards

    def __len__(self) -> int:
        return sum(len(shard["indices"]) for shard in self.shards)

    @cached_property
    def embeddings(self) -> Tensor:
        return self._joined("embeddings")

    @cached_property
    def cls(self) -> Tensor:
        return self._joined("cls")

    @cached_property
    def patches(self) -> Tensor:
        return self._joined("patches")

    @cached_property
    def indices(self) -> Tensor:
        return self._joined("indices")

    @cached_property
    def labels(self) -> Tensor:
        return self._joined("labels")

    @cached_property
    def captions(self) -> list[list[str]]:
        return [captions for shard in self.shards for captions in unpacked(shard["captions"])]

    @cached_property
    def bad(self) -> list[tuple[str, str]]:
        return [(key, reason) for shard in self.shards for key, reason in unpacked(shard["bad"])]

    def _joined(self, name: str) -> Tensor:
        parts = [shard[name] for shard in self.shards]
        return parts[0] if len(parts) == 1 else torch.cat(parts)  # a single one stays mapped


class Features:
    """What one encoder makes of one source. Under torchrun all ranks have to ask for the same things.

    Attributes:
        encoder, source: the two.
        config: batch size, workers, how many examples, where features are kept, and each task's settings.
    """

    def __init__(
        self, encoder: Encoder, source: Source, config: EvaluationConfig, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.encoder = encoder
        self.source = source
        self.config = config
        self._size = config.size or encoder.size
        self._layers = min(LAYERS, encoder.depth)
        self._max_pixels = max_pixels

    def images(self) -> ImageFeatures:
        """Embeddings of the images; encoded when first asked for, unless the store has them.

        Raises:
            UserError: no example can be read, or the encoder's output is not finite.
        """
        return self._images

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(len(texts), E) float32 embeddings of unit length; equal texts are read once and share one embedding."""
        # Sorted by length, so that a batch of short captions is not padded to the length of a long one.
        different = sorted(set(texts), key=lambda text: (len(text), text))
        parts = spans(len(different))
        with together():
            facts = {"kind": "texts", "encoder": self._fingerprint, "texts": hash_of(different)}
            facts |= {"precision": self.config.precision}
        notes = {"model": self.encoder.name, "number_of_texts": len(different)}
        size = len(different) * self.encoder.embed * 4
        store = Store(self.config.features, facts, notes, len(parts), size)
        shards = store.filled(
            lambda numbers: self._read_texts(different, [(i, parts[i]) for i in numbers]),
            f"features of {len(different):,} texts",
        )
        places = {text: place for place, text in enumerate(different)}
        embeddings = [shard["embeddings"] for shard in shards]
        return torch.cat([torch.empty(0, self.encoder.embed), *embeddings])[[places[text] for text in texts]]

    def _read_texts(self, texts: Sequence[str], parts: Sequence[tuple[int, slice]]) -> Iterator[tuple[int, Shard]]:
        batches = [(i, texts[rows]) for i, part in parts for rows in _batches(part, self.config.batch_size)]
        count = sum(len(batch) for _, batch in batches)
        done: list[Tensor] = []
        for place, (i, batch) in enumerate(_shown(batches, len(batches), f"reading {count:,} texts")):
            with self._precision():
                done.append(_finite(_unit(self.encoder.texts(batch)).cpu(), "texts"))
            if place + 1 == len(batches) or batches[place + 1][0] != i:
                yield i, {"embeddings": torch.cat(done)}
                done = []

    @cached_property
    def _fingerprint(self) -> str:
        return self.encoder.fingerprint()

    @cached_property
    def _images(self) -> ImageFeatures:
        positions = spread(len(self.source), self.config.max_examples)
        parts = spans(len(positions))
        with together():
            facts = self._facts(len(positions))
        notes = {"model": self.encoder.name, "data": self.source.uri}
        width = self.encoder.embed + (self._layers + 1) * self.encoder.width
        store = Store(self.config.features, facts, notes, len(parts), len(positions) * width * 4)
        crops = Crops(self.source, positions, self._size, self._max_pixels, self.config.batch_size)
        shards = store.filled(
            lambda numbers: self._encode(crops, [(i, parts[i]) for i in numbers]),
            f"features of {self.source.uri}",
            lambda shard: crops.some_readable(shard["bad_indices"].tolist()),
        )
        images = ImageFeatures(shards)
        tell_bad(self.source.uri, images.bad, len(positions))
        return images

    def _facts(self, examples: int) -> dict[str, Any]:
        """Everything that the features of the images depend on."""
        return {
            "kind": "images",
            "encoder": self._fingerprint,
            "source": self.source.stamp(),
            "class_names": hash_of(self.source.class_names),  # a label may be written as a name
            "examples": len(self.source),
            "encoded": examples,
            "size": self._size,
            "crop": _CROP,
            "mean": self.encoder.mean,
            "std": self.encoder.std,
            "max_pixels": self._max_pixels,
            "precision": self.config.precision,
            "layers": self._layers,
        }

    def _encode(self, crops: Crops, parts: Sequence[tuple[int, slice]]) -> Iterator[tuple[int, Shard]]:
        """Encode the examples of each part, with one set of workers for all of them."""
        if not parts:
            return
        batches = [(i, rows) for i, part in parts for rows in _batches(part, crops.batch_size)]
        count = sum(part.stop - part.start for _, part in parts)
        loader = self._loader(crops, [rows for _, rows in batches])
        found, read = self._nothing(), Read()
        for place, batch in enumerate(_shown(loader, len(batches), f"encoding {count:,} images")):
            read.add(batch)
            if batch.pixels is not None:
                pixels = self.encoder.normalise(batch.pixels.to(self.encoder.device, non_blocking=True))
                with self._precision():
                    encoding = self.encoder.encode(pixels, self._layers)
                for name, tensor in _kept(encoding).items():
                    # What is kept stays on the device until its shard is full: to fetch it the host would have to wait
                    # for each batch. Damaged weights show in the first one.
                    found[name].append(tensor if place else _finite(tensor, "images"))
            if place + 1 == len(batches) or batches[place + 1][0] != batches[place][0]:
                yield batches[place][0], _shard(found, read)
                found, read = self._nothing(), Read()

    def _nothing(self) -> dict[str, list[Tensor]]:
        """Features of no image: a shard of bad examples has them, too."""
        shapes = {
            "embeddings": (0, self.encoder.embed),
            "cls": (0, self._layers, self.encoder.width),
            "patches": (0, self.encoder.width),
        }
        return {name: [torch.empty(shape, device=self.encoder.device)] for name, shape in shapes.items()}

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.encoder.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _loader(self, crops: Crops, batches: Sequence[slice]) -> DataLoader[Read]:
        largest = max((rows.stop - rows.start for rows in batches), default=0)
        workers = count_workers(self.config.workers, largest * 3 * crops.size**2)
        return DataLoader(
            crops,
            batch_size=None,  # the dataset makes whole batches, so that a batch crosses processes as one tensor
            sampler=batches,  # its places in the data set are slices
            num_workers=max(0, min(workers, len(batches) - 1)),  # a single batch is made here
            worker_init_fn=start_worker,
            pin_memory=self.encoder.device.type == "cuda",
        )


def _kept(encoding: Encoding) -> Shard:
    """What is kept of a batch of images, where they were encoded."""
    return {
        "embeddings": _unit(encoding.embedding),
        "cls": torch.stack([layer.cls for layer in encoding.layers], dim=1).float(),
        "patches": encoding.layers[-1].patches.float().mean(dim=(2, 3)),
    }


def _shard(found: Mapping[str, Sequence[Tensor]], read: Read) -> Shard:
    """One shard of `ImageFeatures`."""
    numbers = {"indices": read.indices, "labels": read.labels, "bad_indices": read.bad_indices}
    return (
        {name: _finite(torch.cat(list(parts)).cpu(), "images") for name, parts in found.items()}
        | {name: torch.tensor(values, dtype=torch.int64) for name, values in numbers.items()}
        | {"captions": packed(read.captions), "bad": packed(read.bad)}
    )


def _batches(part: slice, size: int) -> list[slice]:
    return [slice(start, min(start + size, part.stop)) for start in range(part.start, part.stop, size)]


def _shown(items: Iterable[ItemT], total: int, doing: str) -> Iterable[ItemT]:
    """With progress on the first rank; its share stands for all."""
    return track(items, total, doing) if total and ranks.is_main() else items


def _unit(embeddings: Tensor) -> Tensor:
    """Float32, of unit length."""
    return F.normalize(embeddings.float(), dim=-1)


def _finite(features: Tensor, what: str) -> Tensor:
    if not features.isfinite().all():
        raise UserError(
            f"the encoder's embeddings of {what} are not finite; its weights are damaged, evaluate another checkpoint"
        )
    return features
