"""From the file of a mask to the class of every pixel."""

from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from harmony.data.sources.base import BadExample

_VALUES = 2**16
_NO_CLASS = -1


@dataclass(frozen=True)
class Coding:
    """How values of mask files stand for classes, C of them.

    Attributes:
        table: (65536,) int32, value -> class; `ignore` for values of no class, -1 for values that must not be.
        ignore: what pixels without class are in a mask that was read: 255, or 65535 for more than 255 classes.
        said: the values that may be, in words.
    """

    table: NDArray[np.int32]
    ignore: int
    said: str

    @classmethod
    def of(cls, classes: int, ignored: int | None, zero_is_ignored: bool) -> "Coding":
        """The coding of `classes` classes; the value `ignored` has none, nor has 0 where `zero_is_ignored`.

        When `ignored` is None it is 255, or 65535 where 255 is a class.
        """
        first = int(zero_is_ignored)
        if ignored is None:
            ignored = 255 if first + classes <= 255 else 65535
        ignore = 255 if classes <= 255 else 65535
        table = np.full(_VALUES, _NO_CLASS, dtype=np.int32)
        table[first : first + classes] = np.arange(classes)
        table[:first] = ignore
        if 0 <= ignored < _VALUES:
            table[ignored] = ignore
        return cls(table, ignore, f"{first} to {first + classes - 1}, {ignored if not first else f'0 or {ignored}'}")


def read_mask(data: bytes, coding: Coding, key: str, name: str = "its mask") -> NDArray[np.uint8] | NDArray[np.uint16]:
    """The class of every pixel of a mask file, (H, W), uint8 or (for more than 255 classes) uint16.

    Grey and 16-bit files hold values; of palette files the indices count, not the colours.

    Args:
        data: the file.
        coding: what its values mean.
        key: the example, for errors.
        name: the file, for errors.

    Raises:
        BadExample: it is no image, has colours in place of values, or values that stand for no class.
    """
    try:
        opened = Image.open(BytesIO(data))
        opened.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise all sorts
        raise BadExample(key, f"has a mask that cannot be read: {name} ({' '.join(str(error).split())})") from error
    if opened.mode not in ("1", "L", "P") and not opened.mode.startswith("I"):
        raise BadExample(
            key, f"has a mask of colours ({opened.mode}), not of class indices: {name}; save it as grey or palette png"
        )
    values = np.asarray(opened)
    if values.dtype == np.bool_:
        values = values.astype(np.uint8)
    if values.dtype in (np.uint8, np.uint16):
        classes = coding.table[values]
        wrong = classes == _NO_CLASS
    else:
        outside = (values < 0) | (values >= _VALUES)
        classes = coding.table[np.where(outside, 0, values)]
        wrong = outside | (classes == _NO_CLASS)
    if wrong.any():
        raise BadExample(
            key, f"has the value {int(values[wrong][0])} in {name}, which stands for no class (allowed: {coding.said})"
        )
    return classes.astype(np.uint8) if coding.ignore == 255 else classes.astype(np.uint16)
