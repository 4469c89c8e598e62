"""`folder:` - image files, with captions beside them or in folders named after their class.

`cat.jpg` has its captions in `cat.txt`, one a line, or in `cat.json` (under "captions", "caption" or "text"). Where
there are no such files and the images lie in sub-folders, the sub-folders of the top level are the classes.
"""

import json
import os
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from harmony.data.sources.base import BadExample, Example, Source, SourceOptions, spread, stamp_of, words_of
from harmony.data.sources.flat import Strings
from harmony.data.sources.places import nothing_there
from harmony.data.sources.shards import IMAGE_ENDINGS
from harmony.errors import UserError

CAPTION_KEYS = ("captions", "caption", "text")

_CHECKED = 1000
_TEXT, _JSON = 1, 2  # bits


class FolderSource(Source):
    """The images in a folder and its sub-folders, in the order of their names.

    Args:
        place: the folder.
        options: `caption_key` is a key of the json files, or `txt`; `image_key` the one ending that counts as an image.
        uri: for messages; made from `place` when None.

    Raises:
        UserError: no such folder, or no image in it.
    """

    def __init__(self, place: str, options: SourceOptions | None = None, uri: str | None = None) -> None:
        self.uri = uri or f"folder:{place}"
        self.options = options or SourceOptions()
        self._folder = Path(place).expanduser()
        if place and self._folder.is_file():
            raise UserError(f"{self.uri} names a file, not a folder; name the folder it is in")
        if not place or not self._folder.is_dir():
            raise nothing_there(self.uri, "folder", place)
        self._problems: list[str] = []
        self._index()
        if not len(self):
            seen = ", ".join(sorted(self._endings)[:20]) or "no files"
            raise UserError(
                f"{self.uri} has no images: looked for .{', .'.join(self._wanted())}, saw {seen}; name a folder with "
                "image files, or their ending with ?image_key=ENDING"
            )

    def _wanted(self) -> tuple[str, ...]:
        return (self.options.image_key.lower(),) if self.options.image_key else IMAGE_ENDINGS

    def _index(self) -> None:
        """Match images and captions by their names without ending."""
        images: dict[str, str] = {}  # key -> ending
        texts: set[str] = set()
        metadata: set[str] = set()
        twice = []
        self._endings = set()
        for name in walk(self._folder):
            key, dot, ending = name.rpartition(".")
            self._endings.add(f"{dot}{ending}" if dot else "(none)")
            if ending.lower() in self._wanted():
                if key in images:
                    twice.append(name)
                images.setdefault(key, ending)
            elif ending.lower() == "txt":
                texts.add(name)
            elif ending.lower() == "json":
                metadata.add(name)
        if twice:
            self._problems.append(f"images that share a name (the first is used): {len(twice)}, as {twice[0]}")
        keys = sorted(images)
        self._names = Strings.of(f"{key}.{images[key]}" for key in keys)
        self._beside = np.array(
            [_TEXT * (f"{key}.txt" in texts) + _JSON * (f"{key}.json" in metadata) for key in keys], dtype=np.uint8
        )
        self._label = np.full(len(keys), -1, dtype=np.int32)
        if not self._beside.any():
            self._classes(keys)
            return
        alone = len(texts | metadata) - int((self._beside & _TEXT > 0).sum() + (self._beside & _JSON > 0).sum())
        without = int((self._beside == 0).sum())
        if without:
            self._problems.append(f"images without a caption file: {without}")
        if alone:
            self._problems.append(f"text or json files without an image: {alone}")

    def _classes(self, keys: list[str]) -> None:
        tops = [key.partition("/")[0] if "/" in key else None for key in keys]
        names = sorted({top for top in tops if top is not None})
        if names:
            number = {name: place for place, name in enumerate(names)}
            self._label = np.array([-1 if top is None else number[top] for top in tops], dtype=np.int32)
            self.class_names = names
            if None in tops:
                self._problems.append(f"images outside the class folders (no label): {tops.count(None)}")

    def __len__(self) -> int:
        return len(self._names)

    def key(self, i: int) -> str:
        return self._names[i].rpartition(".")[0]

    def __getitem__(self, i: int) -> Example:
        key = self.key(i)
        label = int(self._label[i])
        image = self._read(key, self._names[i])
        return Example(key, image, self._captions(i, key), None if label < 0 else label)

    def _read(self, key: str, name: str) -> bytes:
        try:
            return (self._folder / name).read_bytes()
        except OSError as error:
            raise BadExample(key, f"{name} cannot be read: {os.strerror(error.errno or 0)}") from error

    def _captions(self, i: int, key: str) -> list[str]:
        wanted, captions = self.options.caption_key, []
        if self._beside[i] & _TEXT and wanted in (None, "txt"):
            captions = words_of(self._read(key, f"{key}.txt").decode("utf-8-sig", "replace").splitlines())
        if self._beside[i] & _JSON and not captions:
            metadata = self._metadata(key)
            captions = next(filter(None, (words_of(metadata.get(name)) for name in self._caption_keys())), [])
        return captions

    def _caption_keys(self) -> tuple[str, ...]:
        return CAPTION_KEYS if self.options.caption_key is None else (self.options.caption_key,)

    def _metadata(self, key: str) -> dict[str, Any]:
        try:
            value = json.loads(self._read(key, f"{key}.json"))
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    def has_captions(self) -> bool:
        return any(self._has_caption(int(i)) for i in np.flatnonzero(self._beside))

    def _has_caption(self, i: int) -> bool:
        try:
            return bool(self._captions(i, self.key(i)))
        except BadExample:
            return False

    def caption_fields(self) -> list[str]:
        metadata = np.flatnonzero(self._beside & _JSON)
        keys: dict[str, None] = {}
        for i in metadata[spread(len(metadata), 100)]:
            keys.update(dict.fromkeys(self._metadata(self.key(int(i)))))
        texts = ["text files"] if (self._beside & _TEXT).any() else []
        return texts + [f"json {name!r}" for name in keys]

    def caption_place(self) -> str:
        keys = ", ".join(self._caption_keys())
        return f"text files beside the images and under {keys} in json files beside them"

    def fingerprint(self) -> str:
        digest = blake2b(self._names.data.tobytes(), digest_size=16)
        for i in spread(len(self), _CHECKED):
            path = self._folder / self._names[i]
            digest.update(f"{path.stat().st_size if path.is_file() else None} ".encode())
        digest.update(f"{len(self)} {self.options.caption_key} {self.options.image_key}".encode())
        return digest.hexdigest()

    def stamp(self) -> str:
        return stamp_of(self._files(), self.options)

    def _files(self) -> Iterator[Path]:
        """Every file that examples are made of."""
        folder = self._folder.resolve()
        for name, beside in zip(self._names, self._beside, strict=True):
            yield folder / name
            for bit, ending in ((_TEXT, "txt"), (_JSON, "json")):
                if beside & bit:
                    yield folder / f"{name.rpartition('.')[0]}.{ending}"

    def problems(self) -> list[str]:
        return list(self._problems)


def walk(top: Path) -> Iterator[str]:
    """Names of all files under `top`, relative to it, sorted within each folder; hidden ones are left out."""
    entered: set[tuple[int, int]] = set()  # links may lead round in a circle
    for folder, inner, files in os.walk(top, followlinks=True):
        status = os.stat(folder)  # noqa: PTH116 - os.walk gives strings
        if (status.st_dev, status.st_ino) in entered:
            inner.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        before = Path(folder).relative_to(top).as_posix()
        for name in sorted(files):
            if not name.startswith("."):
                yield name if before == "." else f"{before}/{name}"
