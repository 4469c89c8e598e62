"""`shards:` - WebDataset tar files, read at random by the places that an index knows.

A sample is the files of one tar that share a key: an image (jpg, jpeg, png, webp, ...), and beside it a caption
(`txt`), metadata (`json`) and a class (`cls`), as img2dataset and WebDataset write them.
"""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from harmony.data.sources.base import BadExample, Example, Source, SourceOptions, spread, stamp_of, words_of
from harmony.data.sources.classes import find_class_list, label_of
from harmony.data.sources.flat import OpenFiles, Strings
from harmony.data.sources.index_cache import tar_index
from harmony.data.sources.places import find_files
from harmony.data.sources.tar_index import TarIndex
from harmony.errors import UserError

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
"""What counts as an image when no image_key is given, the first that a sample has."""

CAPTIONS_ORDER = ("captions", "txt", "caption", "text")
"""Where captions are looked for when no caption_key is given: the first that a sample has of the json list "captions"
(the txt beside it then repeats one of them), the file `txt`, the json keys "caption" and "text"."""

_READ = 10_000
"""Samples that are read before it is said that none has a caption."""

_TEXT, _JSON, _CLASS = 0, 1, 2


class ShardSource(Source):
    """The samples of one or more tar files, in the order of the files and, within one, of their first members.

    A sample without an image is left out and mentioned in `problems()`. Keys that come in more than one shard are
    mentioned too, and both samples are kept.

    Args:
        place: path of a shard, with brace ranges or wildcards, or of a folder of `*.tar`.
        options: `caption_key` is the ending of a text file (`txt`) or a json key; `image_key`, `label_key` are endings.
        uri: for messages; made from `place` when None.
        progress: called with (shards indexed, shards in all).

    Raises:
        UserError: no such file, missing files of a range, no tar, or no sample with an image.
    """

    def __init__(
        self,
        place: str,
        options: SourceOptions | None = None,
        uri: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.uri = uri or f"shards:{place}"
        self.options = options or SourceOptions()
        paths = find_files(place, self.uri, "shards", ".tar")
        indices = read_indices(paths, progress)
        self._files = OpenFiles(paths)
        self._endings = sorted({ending for index in indices for ending in index.endings})
        self._problems = [problem for index in indices for problem in index.problems]
        self._join(indices)
        listed = find_class_list(paths[0].parent)
        self._written = listed.written if listed else None
        if self.has_labels():
            self.class_names = listed.names if listed else self._classes_seen()

    def _join(self, indices: Sequence[TarIndex]) -> None:
        """Flat columns over all shards: (N,) places of the image, and (3, N) of text, json and class."""
        caption_key = self.options.caption_key
        text = caption_key.lower() if caption_key and caption_key.lower() in self._endings else "txt"
        beside = (text, "json", self.options.label_key or "cls")
        images = [_first_column(index, self._image_endings()) for index in indices]
        has_image = [offset >= 0 for offset, _ in images]
        self._text_ending = text
        self._shard_ends = np.cumsum([int(has.sum()) for has in has_image])
        self._image_offset, self._image_size = _joined(images, has_image)
        columns = [_joined([index.column(ending) for index in indices], has_image) for ending in beside]
        self._offset, self._size = (np.stack(arrays) for arrays in zip(*columns, strict=True))
        chosen = [np.flatnonzero(has) for has in has_image]
        self._keys = Strings.joined([index.keys.taken(which) for index, which in zip(indices, chosen, strict=True)])
        hashes = np.concatenate([index.hashes[which] for index, which in zip(indices, chosen, strict=True)])
        self._note_duplicates(hashes)
        without = sum(len(has) for has in has_image) - len(self)
        if without:
            self._problems.append(f"samples without an image (left out): {without}")
        if not len(self):
            seen = ", ".join(self._endings) or "no files"
            wanted = self.options.image_key or ", ".join(IMAGE_ENDINGS[:4])
            raise UserError(f"{self.uri} has no images: looked for the endings {wanted}, saw {seen}; check the shards")

    def _image_endings(self) -> Sequence[str]:
        return (self.options.image_key.lower(),) if self.options.image_key else IMAGE_ENDINGS

    def _note_duplicates(self, hashes: np.ndarray) -> None:
        _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        if (counts > 1).any():
            example = self._keys[int(first[counts > 1].min())]
            self._problems.append(
                f"keys that come in several shards (all are used): {int((counts > 1).sum())}, as {example}"
            )

    def __len__(self) -> int:
        return len(self._image_offset)

    def key(self, i: int) -> str:
        return self._keys[i]

    def __getitem__(self, i: int) -> Example:
        key = self.key(i)
        image = self._read(i, key, int(self._image_offset[i]), int(self._image_size[i]))
        return Example(key, image, self._captions(i, key), self._label(i, key))

    def _read(self, i: int, key: str, offset: int, size: int) -> bytes:
        shard = int(np.searchsorted(self._shard_ends, i, side="right"))
        try:
            data = self._files.read(shard, offset, size)
        except OSError as error:
            raise BadExample(key, f"cannot be read from {self._files.paths[shard].name}: {error.strerror}") from error
        if len(data) < size:
            raise BadExample(key, f"{self._files.paths[shard].name} has become shorter since it was indexed")
        return data

    def _part(self, i: int, key: str, part: int) -> bytes | None:
        offset = int(self._offset[part, i])
        return None if offset < 0 else self._read(i, key, offset, int(self._size[part, i]))

    def _json(self, i: int, key: str) -> dict[str, Any]:
        data = self._part(i, key, _JSON)
        try:
            value = json.loads(data) if data else {}
        except ValueError:  # covers json.JSONDecodeError and UnicodeDecodeError
            return {}
        return value if isinstance(value, dict) else {}

    def _text(self, i: int, key: str) -> str:
        return (self._part(i, key, _TEXT) or b"").decode("utf-8", "replace")

    def _captions(self, i: int, key: str) -> list[str]:
        wanted = self.options.caption_key
        if wanted is not None:
            from_text = wanted.lower() == self._text_ending and self._text_ending in self._endings
            return words_of(self._text(i, key) if from_text else self._json(i, key).get(wanted))
        metadata = self._json(i, key)
        for place in CAPTIONS_ORDER:
            captions = words_of(self._text(i, key) if place == "txt" else metadata.get(place))
            if captions:
                return captions
        return []

    def has_captions(self) -> bool:
        """Whether a sample has a caption, of up to 10,000 each with text and with json, spread over the data."""
        text, metadata = (np.flatnonzero(self._size[part] > 0) for part in (_TEXT, _JSON))
        candidates = np.union1d(text[spread(len(text), _READ)], metadata[spread(len(metadata), _READ)])
        return any(self._has_caption(int(i)) for i in candidates)

    def _has_caption(self, i: int) -> bool:
        try:
            return bool(self._captions(i, self.key(i)))
        except BadExample:
            return False

    def caption_fields(self) -> list[str]:
        known = {*self._image_endings(), *IMAGE_ENDINGS, "json", self.options.label_key or "cls"}
        beside = [ending for ending in self._endings if ending not in known]
        metadata = np.flatnonzero(self._offset[_JSON] >= 0)
        keys: dict[str, None] = {}
        for i in metadata[spread(len(metadata), 100)]:
            keys.update(dict.fromkeys(self._json(int(i), "")))
        return [f".{ending}" for ending in beside] + [f"json {name!r}" for name in keys]

    def caption_place(self) -> str:
        wanted = self.options.caption_key
        if wanted is None:
            return "the json keys captions, caption and text and in .txt files"
        return f".{wanted} files" if wanted.lower() in self._endings else f"the json key {wanted!r}"

    def has_labels(self) -> bool:
        return bool((self._offset[_CLASS] >= 0).any())

    def _label(self, i: int, key: str) -> int | None:
        written = self._part(i, key, _CLASS)
        if written is None:
            return None
        return label_of(written.decode("utf-8", "replace"), self.class_names, key, self._written)

    def _classes_seen(self) -> list[str] | None:
        """The names in the class files, sorted, when they hold names and not numbers."""
        first = int(np.flatnonzero(self._offset[_CLASS] >= 0)[0])
        if (self._part(first, "", _CLASS) or b"").strip().isdigit():
            return None
        written = (self._part(int(i), "", _CLASS) for i in np.flatnonzero(self._offset[_CLASS] >= 0))
        return sorted({(name or b"").decode("utf-8", "replace").strip() for name in written})

    def fingerprint(self) -> str:
        digest = blake2b(digest_size=16)
        for path in self._files.paths:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode("utf-8", "surrogateescape"))
        digest.update(f"{len(self)} {self.options.caption_key} {self.options.image_key}".encode())
        return digest.hexdigest()

    def stamp(self) -> str:
        return stamp_of([path.resolve() for path in self._files.paths], self.options)

    def problems(self) -> list[str]:
        return list(self._problems)


def read_indices(paths: Sequence[Path], progress: Callable[[int, int], None] | None = None) -> list[TarIndex]:
    """The indices of all shards, several read at a time: a disk answers many requests faster than one by one."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        indices = []
        for index in pool.map(tar_index, paths):
            indices.append(index)
            if progress:
                progress(len(indices), len(paths))
        return indices


def _first_column(index: TarIndex, endings: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and sizes of the first of `endings` that each sample has."""
    offset, size = index.column(endings[0])
    for ending in endings[1:]:
        if ending in index.endings:
            other_offset, other_size = index.column(ending)
            missing = offset < 0
            offset[missing], size[missing] = other_offset[missing], other_size[missing]
    return offset, size


def _joined(
    columns: Sequence[tuple[np.ndarray, np.ndarray]], chosen: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The chosen rows of each shard's (offset, size), end to end."""
    offsets = np.concatenate([offset[which] for (offset, _), which in zip(columns, chosen, strict=True)])
    sizes = np.concatenate([size[which] for (_, size), which in zip(columns, chosen, strict=True)])
    return offsets, sizes
