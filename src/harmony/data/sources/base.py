"""What every source of examples offers, whatever it reads from."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from harmony.errors import UserError, unknown


class BadExample(Exception):  # noqa: N818 - it names the example, and is met, counted and replaced
    """One example cannot be used: it is missing, damaged, too large or without what is needed of it.

    Args:
        key: the example's name in its source.
        reason: what is wrong, as it can stand behind "the image".
    """

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


@dataclass(frozen=True)
class Objects:
    """The things on one image, K of them; places are in pixels of the image as decoded.

    Attributes:
        boxes: (K, 4) float32, left, top, right, bottom.
        labels: (K,) int64, class indices into the source's `object_names`.
        crowd: (K,) bool, regions of many things that are neither learned nor counted as missed.
        areas: (K,) float32, of the things in px, which decide what counts as small, medium and large.
        masks: () -> (K, H, W) bool, or None where the data have boxes alone.
        image_id: the image's number in the file it comes from, for writing results.
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    areas: NDArray[np.float32]
    masks: Callable[[], NDArray[np.bool_]] | None = None
    image_id: int = 0


@dataclass(frozen=True)
class Example:
    """One image and what is known of it.

    Attributes:
        key: its name, unique in most sources; for messages and for matching.
        image: the encoded file, or a picture for sources that make their own.
        captions: none, one or several.
        label: class index, for evaluation; a batch carries it only for a supervised objective.
        mask: class of every pixel of the image as decoded, (H, W) uint8 or uint16, for evaluation alone; the source has
            decoded it and checked that it holds nothing but classes and `mask_ignore`.
        objects: the things on the image, likewise.
    """

    key: str
    image: bytes | Image.Image
    captions: list[str] = field(default_factory=list)
    label: int | None = None
    mask: NDArray[Any] | None = None
    objects: Objects | None = None


@dataclass(frozen=True)
class SourceOptions:
    """How a source finds the parts of an example; None leaves it to the source's usual names.

    A URI may give each of them as well: `table:pairs.csv?caption_key=title&images=pictures`.

    Attributes:
        caption_key: where captions are: a column, a json key or the ending of a text file (`txt`).
        image_key: where the image is: a column or the ending of a file (`jpg`).
        label_key: where the class is: a column or the ending of a file (`cls`).
        images: folder that the image paths of a table are relative to; the table's own when None.
    """

    caption_key: str | None = None
    image_key: str | None = None
    label_key: str | None = None
    images: str | None = None

    def overridden(self, query: dict[str, str]) -> "SourceOptions":
        """With what a URI's query says in place of these; UserError for a name that is not an option."""
        names = [option.name for option in fields(self)]
        for name in query:
            if name not in names:
                raise unknown("setting in a data URI", name, names)
        return replace(self, **query)


class Source(ABC):
    """A fixed number of examples in a fixed order, each readable on its own.

    A source is shared with worker processes, by fork or by pickle. It keeps its index in flat arrays (a Python object
    an item would be copied into every worker as soon as its reference count changes) and opens files where it reads.

    Attributes:
        uri: what it was opened from.
        class_names: names of the classes that labels count, when they are known.
        mask_names: names of the classes that pixels of masks count; None where there are no masks.
        mask_ignore: the pixel value that belongs to no class.
        object_names: names of the classes of things; None where there are no things.
        has_object_masks: whether things have masks.
    """

    uri: str
    class_names: list[str] | None = None
    mask_names: list[str] | None = None
    mask_ignore: int = 255
    object_names: list[str] | None = None
    has_object_masks: bool = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, i: int) -> Example:
        """Read example i of 0 .. len-1; BadExample when it cannot be read."""

    @abstractmethod
    def key(self, i: int) -> str:
        """Name of example i, without reading it."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A short text that differs when the examples' names, sizes or number do; the same wherever they lie."""

    def stamp(self) -> str:
        """A short text that differs once anything of an example has changed, its captions and label too.

        Unlike the fingerprint it may differ between copies: files are known by their place, size and time of change.
        Features on disk are kept under it.
        """
        return self.fingerprint()

    def shares_examples(self, other: "Source") -> bool:
        """Whether some examples are known to be those of another source, without reading them."""
        return False

    def has_captions(self) -> bool:
        """Whether some example has a caption where this source looks for captions."""
        return False

    def has_labels(self) -> bool:
        """Whether examples have labels."""
        return self.class_names is not None

    def caption_fields(self) -> list[str]:
        """Where captions might be, as seen in the data: columns, json keys, endings; none of images and classes."""
        return []

    def caption_place(self) -> str:
        """Where this source looked for captions, in words."""
        return "this source"

    def problems(self) -> list[str]:
        """What is wrong with the data as far as the index shows: damaged shards, duplicate keys, missing parts."""
        return []

    def require_captions(self) -> None:
        """UserError when no example has a caption where this source looks for captions."""
        if not self.has_captions():
            seen = ", ".join(self.caption_fields())
            only = "images and classes" if self.has_labels() else "images"
            raise UserError(
                f"no example of {self.uri} has a caption: looked in {self.caption_place()}, and saw "
                + (
                    f"{seen}; name the right one with data.caption_key"
                    if seen
                    else f"only {only}; use data with captions"
                )
            )

    def require_labels(self) -> None:
        """UserError when no example has a label where this source looks for labels."""
        if not self.has_labels():
            raise UserError(
                f"no example of {self.uri} has a class, but an objective of this recipe learns from classes; use data "
                "with classes (?label_key=NAME in its URI says where they are), or set the objective to null"
            )


def stamp_of(paths: Iterable[Path], *options: object) -> str:
    """A hash of the place, size and time of change of files (which may be missing) and of how they are read."""
    digest = blake2b(repr(options).encode(), digest_size=16)
    for path in paths:
        try:
            status = path.stat()
            found = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:
            found = "missing"
        digest.update(os.fsencode(path) + f" {found}\n".encode())
    return digest.hexdigest()


def unknown_split(split: str, splits: Iterable[str], uri: str) -> UserError:
    """An error for a split that is not among `splits`; there are few, so it lists all."""
    return UserError(f"{uri} has no split {split!r}; choose one of {', '.join(sorted(splits)) or 'none'}")


def words_of(value: Any) -> list[str]:
    """The captions in a json value or a table's cell: a text, or a list of texts; blank ones are left out."""
    if isinstance(value, str):
        text = " ".join(value.split())
        return [text] if text else []
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [text for item in value if isinstance(item, str) for text in words_of(item)]
    return []


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` indices spread evenly over 0 .. count-1."""
    wanted = min(count, wanted)
    return [place * count // wanted for place in range(wanted)]
