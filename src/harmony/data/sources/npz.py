"""`npz:` - images and labels in NumPy arrays, as MedMNIST keeps them: `train_images`, `train_labels`, ...

    npz:cifar.npz?split=train       the arrays train_images and train_labels
    npz:plain.npz                   the arrays images and labels

Images are (N, H, W, 3) or grey (N, H, W), uint8; labels (N,) or (N, 1), whole numbers, -1 for none. The names of the
classes are the array `class_names`, or lie beside the file.
"""

import zipfile
import zlib
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from harmony.data.sources.base import Example, Source, stamp_of, unknown_split
from harmony.data.sources.classes import find_classes
from harmony.data.sources.places import nothing_there
from harmony.errors import UserError
from harmony.validation import validated


class NpzSettings(BaseModel):
    """What a URI may say behind the question mark."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: Annotated[str | None, Field(min_length=1, description="arrays SPLIT_images and SPLIT_labels are read")] = (
        None
    )


class NpzSource(Source):
    """The images of one split of an npz file, in their order.

    Arrays are read whole when the source is opened, since such files are compressed; processes forked later share them,
    and a copy sent by pickle reads its own.

    Args:
        place: the file.
        query: settings as text.
        uri: what it was opened from.

    Raises:
        UserError: no such file or split, or arrays of another shape or kind.
    """

    def __init__(self, place: str, query: dict[str, str], uri: str) -> None:
        self.uri = uri
        self._path = Path(place).expanduser()
        if not place or not self._path.is_file():
            raise nothing_there(uri, "file", place)
        self._split = validated(NpzSettings, query, "npz").split
        self._read()

    def _read(self) -> None:
        try:
            opened = np.load(self._path, allow_pickle=False)
            if not isinstance(opened, np.lib.npyio.NpzFile):
                raise UserError(f"{self.uri} is a single array; save images and labels with numpy.savez")
            with opened as arrays:
                prefix = self._prefix(list(arrays))
                self._images = _images(arrays[f"{prefix}images"], f"{prefix}images of {self.uri}")
                self._labels = self._checked_labels(arrays, f"{prefix}labels")
                self.class_names = self._names(arrays)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{self.uri} cannot be read as npz ({reason}); save it again with numpy.savez") from error

    def _prefix(self, names: list[str]) -> str:
        splits = sorted(name.removesuffix("_images") for name in names if name.endswith("_images"))
        if self._split is not None:
            if self._split not in splits:
                raise unknown_split(self._split, splits, self.uri)
            return f"{self._split}_"
        if "images" in names:
            return ""
        if not splits:
            seen = ", ".join(names) or "no arrays"
            raise UserError(f"{self.uri} has neither images nor SPLIT_images: saw {seen}; name the arrays so")
        if len(splits) > 1:
            raise UserError(f"{self.uri} has the splits {', '.join(splits)}; choose one with ?split={splits[0]}")
        return f"{splits[0]}_"

    def _checked_labels(self, arrays: Any, name: str) -> NDArray[np.int64] | None:
        if name not in arrays:
            return None
        labels = np.asarray(arrays[name])
        where = f"{name} of {self.uri}"
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        if labels.shape != (len(self._images),):
            several = " (several labels an image are not supported)" if labels.ndim == 2 else ""
            raise UserError(
                f"{where} has the shape {labels.shape} beside {len(self._images)} images{several}; give one an image"
            )
        whole = labels.astype(np.int64)
        if not np.array_equal(whole, labels) or (whole < -1).any():
            raise UserError(f"{where} holds what is no class index; give whole numbers from 0, or -1 for none")
        return whole

    def _names(self, arrays: Any) -> list[str] | None:
        names = [str(name) for name in arrays["class_names"]] if "class_names" in arrays else None
        return names or find_classes(self._path.parent)

    def __len__(self) -> int:
        return len(self._images)

    def key(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(f"{i} is not in 0 .. {len(self) - 1}")
        return f"{self._split or 'image'}-{i:06d}"

    def __getitem__(self, i: int) -> Example:
        label = -1 if self._labels is None else int(self._labels[i])
        return Example(self.key(i), Image.fromarray(self._images[i]), label=None if label < 0 else label)

    def has_labels(self) -> bool:
        return self._labels is not None

    def fingerprint(self) -> str:
        return f"npz {self._path.name} {self._path.stat().st_size} {self._split} {len(self)}"

    def stamp(self) -> str:
        return stamp_of([self._path.absolute()], self.uri)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_images", "_labels")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._read()


def _images(images: NDArray[Any], where: str) -> NDArray[np.uint8]:
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if images.dtype != np.uint8:
        raise UserError(f"{where} is {images.dtype}; give uint8, 0 .. 255")
    if not (images.ndim == 3 or (images.ndim == 4 and images.shape[-1] in (3, 4))):
        raise UserError(f"{where} has the shape {images.shape}; give (N, H, W, 3), or (N, H, W) for grey")
    if not images.size:
        raise UserError(f"{where} holds no image; name another split or file")
    return images
