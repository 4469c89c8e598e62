"""Features on disk: extracted once, in shards that are whole or not there, and found again by what they are made from.

    FOLDER/KEY/about.json                       what they are made from, for people
    FOLDER/KEY/00003-of-00032.safetensors       one shard

KEY is a hash of everything that changes the features, so features of other weights, data or preprocessing are other
files, and nothing ever has to be found out of date. Shards are mapped into memory: what is not looked at is not read.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from harmony import ranks
from harmony.disk import is_full
from harmony.evaluation.progress import say
from harmony.training.checkpoints import version_of
from harmony.training.distributed import everyones, together

FORMAT = 1
"""Of the shards and of how they are made; raise it when either changes, and features are extracted anew."""

LARGEST, SMALLEST, WANTED = 16_384, 1_024, 32
"""Examples in a shard: at most, at least, and in between as many as give this number of shards."""

_FORGOTTEN = 24 * 3600
"""Seconds after which a file that was being written belongs to nobody any more."""

Shard = dict[str, Tensor]
Maker = Callable[[Sequence[int]], Iterable[tuple[int, Shard]]]
"""From the numbers of shards to those shards, one after the other."""


class Store:
    """The shards of one set of features, on disk or, where nothing can be written, in memory.

    Args:
        folder: the setting `features`: a folder, "auto" for the user's cache, or None for memory alone.
        facts: everything that the features depend on, as JSON; makes the key.
        notes: what else people may want to know of them.
        shards: how many shards there are.
        size: bytes that all of them will take, about.
    """

    def __init__(
        self, folder: str | None, facts: Mapping[str, Any], notes: Mapping[str, Any], shards: int, size: int
    ) -> None:
        self._facts = {"format": FORMAT} | dict(facts)
        self._notes = dict(notes)
        self._key = hash_of(self._facts)
        self._count, self._size = shards, size
        self.folder = None if folder is None else place_of(folder) / self._key
        self._writes = self.folder is not None
        self._found: dict[int, Shard] = {}
        self._unwritten: set[int] = set()

    def filled(self, make: Maker, what: str, stale: Callable[[Shard], bool] = lambda shard: False) -> list[Shard]:
        """All shards: those that are there, and the others made, each by one rank. Every rank has to call it.

        Args:
            make: makes shards.
            what: what they hold, for messages: "features of folder:photos".
            stale: whether a shard that is there is to be made anew.
        """
        with together():
            missing = [i for i in range(self._count) if (shard := self._get(i)) is None or stale(shard)]
        missing = everyones(missing)[0]  # the first rank's word counts, so that no shard is made twice or by nobody
        for i in missing:
            self._found.pop(i, None)
        with together():
            if missing:
                self._prepare()
            self._tell(what, missing)
            for i, shard in make(missing[ranks.rank() :: ranks.count()]):
                self._put(i, shard)
        for theirs in everyones({i: self._found[i] for i in self._unwritten}):  # of ranks that could not write
            self._found |= theirs
        with together():  # ranks on hosts without a common disk do not see each other's shards
            for i, shard in make([i for i in range(self._count) if self._get(i) is None]):
                self._found[i] = shard
        return [self._found[i] for i in range(self._count)]

    def _path(self, i: int) -> Path | None:
        return None if self.folder is None else self.folder / f"{i:05d}-of-{self._count:05d}.safetensors"

    def _get(self, i: int) -> Shard | None:
        """Shard i, mapped from disk where it is not in memory; None when it is not there or damaged."""
        path = self._path(i)
        if i not in self._found and path is not None:
            try:
                with safetensors.safe_open(path, "pt") as file:
                    if (file.metadata() or {}).get("key") == self._key:
                        self._found[i] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except (FileNotFoundError, NotADirectoryError):
                return None
            except (OSError, SafetensorError):  # shorter than its header says, or no such file at all
                if ranks.is_main():
                    say(f"{path} is damaged; what it held is extracted again")
        return self._found.get(i)

    def _put(self, i: int, shard: Shard) -> None:
        """Keep shard i, on disk or else in memory."""
        path = self._path(i)
        if path is not None and self._writes:
            try:
                _write(path, lambda aside: _save(shard, aside, {"key": self._key}))
            except (OSError, SafetensorError) as error:
                self._no_disk(error)
            else:
                return
        self._found[i] = shard
        self._unwritten.add(i)

    def _prepare(self) -> None:
        """Make the folder with its about.json; without a disk to write to, all goes on in memory."""
        if self.folder is None:
            return
        about = self._facts | self._notes | {f"{name}_version": version_of(name) for name in ("harmony", "torch")}
        text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _sweep(self.folder)
            _write(self.folder / "about.json", lambda aside: aside.write_text(text, encoding="utf-8"))
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            self._no_disk(error)
            return
        there = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
        if free < self._size - there:
            self._writes = False
            if ranks.is_main():
                say(f"features take {_size(self._size)}, and {self.folder} has {_size(free)} free; they stay in memory")

    def _no_disk(self, error: Exception) -> None:
        self._writes = False
        reason = "the disk is full" if is_full(error) else getattr(error, "strerror", None) or str(error)
        say(f"features cannot be kept in {self.folder} ({reason}); they stay in memory")

    def _tell(self, what: str, missing: Sequence[int]) -> None:
        if not ranks.is_main() or self.folder is None:
            return
        if not missing:
            say(f"{what}: taken from {self.folder}")
        elif self._writes:
            done = self._count - len(missing)
            going_on = f", going on with {done} of {self._count} shards done" if done else ""
            say(f"{what}: kept in {self.folder}, {_size(self._size)}{going_on}")


def place_of(folder: str) -> Path:
    """The folder that the setting `features` means."""
    if folder != "auto":
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "harmony" / "features"


def spans(count: int) -> list[slice]:
    """0 .. count - 1 in shards. A function of `count` alone, so that shards are found again by any number of ranks.

    Small sets are cut finer than large ones, so that several ranks have something to do, and an interruption costs
    little.
    """
    size = min(LARGEST, max(SMALLEST, -(-count // WANTED)))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def hash_of(value: Any) -> str:
    """A hash of what can be written as JSON."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def packed(value: Any) -> Tensor:
    """JSON as a tensor of bytes, so that it lies in the same file as the numbers it belongs to."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def unpacked(tensor: Tensor) -> Any:
    """The inverse of `packed`."""
    return json.loads(tensor.numpy().tobytes())


def _save(shard: Shard, path: Path, metadata: dict[str, str]) -> None:
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in shard.items()}, path, metadata)


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write aside, bring it safely to disk, rename: whoever looks at `path` sees all of it or nothing."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(aside)
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        aside.chmod(0o644)  # safetensors lets nobody else read its file
        aside.replace(path)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove what killed processes were writing."""
    for path in folder.glob(".*"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < time.time() - _FORGOTTEN:
                path.unlink()


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
