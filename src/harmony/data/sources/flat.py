"""Many strings in two flat arrays, and files that stay open per process."""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import overload

import numpy as np


class Strings(Sequence[str]):
    """An immutable list of strings that costs its bytes and 8 more a string; counting references never touches it.

    Attributes:
        data: (total bytes,) uint8, the strings end to end in UTF-8 (file names that are not UTF-8 survive).
        ends: (N,) int64, where each of them ends.
    """

    def __init__(self, data: np.ndarray, ends: np.ndarray) -> None:
        self.data = data
        self.ends = ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> "Strings":
        return cls.of_bytes([string.encode("utf-8", "surrogateescape") for string in strings])

    @classmethod
    def of_bytes(cls, encoded: Sequence[bytes]) -> "Strings":
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), np.cumsum(lengths, dtype=np.int64))

    @classmethod
    def joined(cls, parts: Sequence["Strings"]) -> "Strings":
        starts = np.cumsum([0] + [len(part.data) for part in parts])
        ends = [part.ends + start for part, start in zip(parts, starts[:-1], strict=True)]
        return cls(np.concatenate([part.data for part in parts]), np.concatenate(ends))

    def taken(self, indices: np.ndarray) -> "Strings":
        """Those at `indices`, in that order."""
        if len(indices) == len(self) and np.array_equal(indices, np.arange(len(self))):
            return self
        return Strings.of_bytes([self.bytes_at(int(i)) for i in indices])

    def bytes_at(self, i: int) -> bytes:
        start = self.ends[i - 1] if i else 0
        return self.data[start : self.ends[i]].tobytes()

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not 0 <= i < len(self):
            raise IndexError(f"{i} is not in 0 .. {len(self) - 1}")
        return self.bytes_at(i).decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


class OpenFiles:
    """Files read at given places, opened when first needed and kept open, at most `limit` at a time.

    Reading with pread moves no shared position, so processes that inherit a descriptor do not disturb each other; a
    copy sent by pickle opens its own.
    """

    def __init__(self, paths: Sequence[Path], limit: int = 128) -> None:
        self.paths = list(paths)
        self.limit = limit
        self._open: OrderedDict[int, FileIO] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, number: int, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` of file `number` (fewer where the file ends); OSError when it cannot be read."""
        # The local name keeps the file open even when another thread drops it from the table meanwhile.
        file = self._file(number)
        return os.pread(file.fileno(), size, offset)

    def _file(self, number: int) -> FileIO:
        with self._lock:
            file = self._open.get(number)
            if file is None:
                file = self._open[number] = FileIO(self.paths[number])
                if len(self._open) > self.limit:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(number)
            return file

    def __getstate__(self) -> dict[str, object]:
        return {"paths": self.paths, "limit": self.limit}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]
