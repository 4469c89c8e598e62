"""Files that other files name: in a folder with its sub-folders, or in one or more tars."""

import os
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from harmony.data.sources.base import BadExample, spread
from harmony.data.sources.flat import OpenFiles, Strings
from harmony.data.sources.folders import walk
from harmony.data.sources.places import find_files
from harmony.data.sources.shards import read_indices
from harmony.data.sources.tar_index import TarIndex

_CHECKED = 1000


class NamedFiles:
    """Files by number and by name.

    Attributes:
        names: their paths within the folder or tar; in a tar, what follows the first dot is in lower case.
        place: the folder, or the first tar.
        problems: what is wrong with the tars.
    """

    names: Strings
    place: Path
    problems: list[str]

    def read(self, number: int, key: str) -> bytes:
        """The bytes of a file; BadExample with `key` when it cannot be read."""
        raise NotImplementedError

    def size(self, number: int) -> int:
        """Bytes of a file; -1 when it has gone."""
        raise NotImplementedError

    def files(self, numbers: NDArray[np.int64]) -> Iterator[Path]:
        """What lies on disk of these files: the files themselves, or the tars, for `stamp_of`."""
        raise NotImplementedError

    def find(self, wanted: Iterable[str]) -> NDArray[np.int64]:
        """The number of each wanted file, -1 where there is none.

        A name counts with its folders or, where no file has that path, by its last part if a single file has it: lists
        often say `val2014/a.jpg` or `a.jpg` where the other would be right. Upper and lower case of endings are one.
        """
        whole: dict[str, int] = {}
        last: dict[str, int] = {}
        for number, name in enumerate(self.names):
            folded = _folded(name)
            whole.setdefault(folded, number)
            base = folded.rpartition("/")[2]
            last[base] = -1 if base in last else number
        found = []
        for name in wanted:
            folded = _folded(name.replace("\\", "/").removeprefix("./"))
            found.append(whole[folded] if folded in whole else last.get(folded.rpartition("/")[2], -1))
        return np.array(found, dtype=np.int64)

    def digest(self, numbers: NDArray[np.int64]) -> str:
        """A short text that differs when the names of these files or their sizes do (of a thousand, spread evenly)."""
        digest = blake2b(digest_size=16)
        for number in numbers:
            digest.update(self.names.bytes_at(int(number)) + b"\n")
        for i in spread(len(numbers), _CHECKED):
            digest.update(f"{self.size(int(numbers[i]))} ".encode())
        return digest.hexdigest()


class FolderFiles(NamedFiles):
    """The files in a folder and its sub-folders; hidden ones are left out."""

    def __init__(self, folder: Path) -> None:
        self.place = folder
        self.problems = []
        self.names = Strings.of(list(walk(folder)))

    def read(self, number: int, key: str) -> bytes:
        name = self.names[number]
        try:
            return (self.place / name).read_bytes()
        except OSError as error:
            raise BadExample(key, f"{name} cannot be read: {os.strerror(error.errno or 0)}") from error

    def size(self, number: int) -> int:
        path = self.place / self.names[number]
        return path.stat().st_size if path.is_file() else -1

    def files(self, numbers: NDArray[np.int64]) -> Iterator[Path]:
        return (self.place.absolute() / self.names[int(number)] for number in numbers)


class TarFiles(NamedFiles):
    """The files in one or more tars."""

    def __init__(self, paths: list[Path]) -> None:
        self.place = paths[0]
        indices = read_indices(paths)
        self.problems = [problem for index in indices for problem in index.problems]
        self.names = Strings.joined([_names(index) for index in indices])
        self._files = OpenFiles(paths)
        self._tar = np.repeat(np.arange(len(paths), dtype=np.int32), [len(index.sample) for index in indices])
        self._offset = np.concatenate([index.offset for index in indices])
        self._size = np.concatenate([index.size for index in indices])

    def read(self, number: int, key: str) -> bytes:
        tar, size = int(self._tar[number]), self.size(number)
        try:
            data = self._files.read(tar, int(self._offset[number]), size)
        except OSError as error:
            raise BadExample(key, f"cannot be read from {self._files.paths[tar].name}: {error.strerror}") from error
        if len(data) < size:
            raise BadExample(key, f"{self._files.paths[tar].name} has become shorter since it was indexed")
        return data

    def size(self, number: int) -> int:
        return int(self._size[number])

    def files(self, numbers: NDArray[np.int64]) -> Iterator[Path]:
        return (path.absolute() for path in self._files.paths)


def open_files(place: str | Path, uri: str, what: str = "images") -> NamedFiles:
    """The files in a folder, or in a tar or several (brace ranges, wildcards).

    Raises:
        UserError: nothing is there, or a file is no tar.
    """
    folder = Path(place).expanduser()
    if str(place) and folder.is_dir():
        return FolderFiles(folder)
    return TarFiles(find_files(str(place), uri, what, ".tar"))


def beside(written: str, file: Path) -> str:
    """A place as written where that exists, or else beside `file` where it exists there."""
    there = file.parent / Path(written).expanduser()
    return str(there) if not Path(written).expanduser().exists() and there.exists() else written


def _names(index: TarIndex) -> Strings:
    keys, endings = index.keys, index.endings
    return Strings.of(
        [f"{keys[int(sample)]}.{endings[int(end)]}" for sample, end in zip(index.sample, index.ending, strict=True)]
    )


def _folded(name: str) -> str:
    """The name with its endings, all that follows the first dot of the last part, in lower case."""
    folders, slash, base = name.rpartition("/")
    stem, dot, ending = base.partition(".")
    return f"{folders}{slash}{stem}{dot}{ending.lower()}"
