"""Where everything lies in a tar file, found by reading its headers alone.

Format: POSIX ustar and pax (IEEE 1003.1) and GNU long names. A member belongs to the sample that its name says, as
WebDataset has it: the key is everything up to the first dot of the base name, the ending is the rest.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harmony.data.sources.flat import Strings
from harmony.errors import UserError

BLOCK = 512
_WINDOW = 8192  # bytes fetched at a time: the small texts of a sample and the next image's header come together
_NAME = re.compile(r"^(?:\./)?((?:.*/)?[^./][^./]*)\.([^/]+)$")
_NO_DATA = b"123456"  # links, devices, folders, pipes
_FILES = b"0\x007"


@dataclass(frozen=True)
class TarIndex:
    """The members of one tar file that have a key and an ending, in flat arrays.

    Shapes: K samples in the order of their first members, M members.

    Attributes:
        keys: (K,) the samples' keys.
        hashes: (K,) uint64, a hash of each key, to find duplicates across files.
        endings: the distinct endings, in lower case.
        sample, ending: (M,) int32, which sample and which ending a member is.
        offset, size: (M,) int64, where its bytes are.
        problems: what is wrong with the file, in words.
    """

    keys: Strings
    hashes: np.ndarray
    endings: list[str]
    sample: np.ndarray
    ending: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    problems: list[str]

    def column(self, ending: str) -> tuple[np.ndarray, np.ndarray]:
        """Offsets and sizes (K,) of the members with that ending; an offset of -1 where a sample has none."""
        offset, size = np.full(len(self.keys), -1, dtype=np.int64), np.zeros(len(self.keys), dtype=np.int64)
        if ending in self.endings:
            chosen = self.ending == self.endings.index(ending)
            offset[self.sample[chosen]], size[self.sample[chosen]] = self.offset[chosen], self.size[chosen]
        return offset, size


class _DamageError(Exception):
    """The rest of a tar file cannot be read."""


def scan_tar(path: Path) -> TarIndex:
    """Index a tar file; what lies before a damaged place is kept, and the damage is noted.

    Raises:
        UserError: the file is compressed, or no tar file at all.
    """
    numbers: dict[str, int] = {}  # key -> sample
    endings: dict[str, int] = {}
    seen: set[tuple[int, int]] = set()
    rows: list[tuple[int, int, int, int]] = []
    problems: list[str] = []
    duplicates: list[str] = []
    damaged = False
    with path.open("rb", buffering=0) as file:
        try:
            for name, offset, size in _members(file.fileno(), path):
                match = _NAME.match(name)
                if not match:
                    continue
                sample = numbers.setdefault(match[1], len(numbers))
                ending = endings.setdefault(match[2].lower(), len(endings))
                if (sample, ending) in seen:
                    duplicates.append(name)
                    continue
                seen.add((sample, ending))
                rows.append((sample, ending, offset, size))
        except _DamageError as error:
            problems.append(f"{path.name}: {error}; the {len(numbers)} samples before are used")
            damaged = True
    if duplicates:
        problems.append(
            f"{path.name}: files that come twice (the first is used): {len(duplicates)}, as {duplicates[0]}"
        )
    keys = list(numbers)
    if damaged and _last_is_incomplete(rows, len(keys)):
        problems[0] = problems[0].replace(f"the {len(keys)} samples", f"the {len(keys) - 1} complete samples")
        rows = [row for row in rows if row[0] != len(keys) - 1]
        keys.pop()
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    return TarIndex(
        keys=Strings.of(keys),
        hashes=np.fromiter((_hash(key) for key in keys), dtype=np.uint64, count=len(keys)),
        endings=list(endings),
        sample=table[:, 0].astype(np.int32),
        ending=table[:, 1].astype(np.int32),
        offset=table[:, 2].copy(),
        size=table[:, 3].copy(),
        problems=problems,
    )


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


def _last_is_incomplete(rows: list[tuple[int, int, int, int]], samples: int) -> bool:
    """Whether the last sample lacks something that the one before it has: the damage then cut it in two."""
    last, before = ({row[1] for row in rows[-64:] if row[0] == sample} for sample in (samples - 1, samples - 2))
    return samples > 1 and last < before


def _members(descriptor: int, path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset of the data, size) of every regular file in a tar."""
    total = os.fstat(descriptor).st_size
    window, window_start = b"", 0
    position = 0
    long_name: str | None = None
    long_size: int | None = None
    while True:
        if not window_start <= position <= window_start + len(window) - BLOCK:
            window, window_start = os.pread(descriptor, _WINDOW, position), position
        header = window[position - window_start : position - window_start + BLOCK]
        if position == 0:
            _refuse_what_is_no_tar(header, path)
        if header.count(0) == BLOCK:
            return
        if len(header) < BLOCK:
            end = "it has no end mark, and may be cut short" if not header else f"it is cut off at byte {total}"
            raise _DamageError(end)
        if not _sum_is_right(header):
            raise _DamageError(f"it is damaged at byte {position} of {total}")
        kind, size = header[156], _number(header[124:136])
        size = 0 if kind in _NO_DATA else size if long_size is None or kind in b"xgLK" else long_size
        data = position + BLOCK
        position = data + -(-size // BLOCK) * BLOCK
        if size < 0 or data + size > total:
            raise _DamageError(f"it is cut off at byte {total}, within {long_name or _name(header)}")
        if kind in b"L":
            long_name = _text(os.pread(descriptor, size, data).rstrip(b"\0"))
        elif kind in b"x":
            fields = _pax_fields(os.pread(descriptor, size, data))
            long_name = fields.get("path", long_name)
            long_size = int(fields["size"]) if fields.get("size", "").isdigit() else None
        elif kind not in b"gK":
            if kind in _FILES:
                yield long_name if long_name is not None else _name(header), data, size
            long_name = long_size = None


def _refuse_what_is_no_tar(header: bytes, path: Path) -> None:
    magics = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
    for magic, program in magics.items():
        if header.startswith(magic):
            raise UserError(
                f"{path} is compressed with {program}, so single samples cannot be reached; decompress it first"
            )
    if not header:
        raise UserError(f"{path} is empty (0 bytes); remove it or fetch it again")
    if len(header) == BLOCK and header.count(0) != BLOCK and not _sum_is_right(header):
        raise UserError(f"{path} is not a tar file; name WebDataset tar shards")


def _sum_is_right(header: bytes) -> bool:
    try:
        return sum(header) - sum(header[148:156]) + 8 * 32 == _number(header[148:156])
    except ValueError:
        return False


def _number(field: bytes) -> int:
    """Octal text, or (GNU) a big-endian number behind a byte of 0x80."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _name(header: bytes) -> str:
    name = _text(header[:100].split(b"\0", 1)[0])
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return f"{_text(prefix)}/{name}" if prefix else name


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _pax_fields(data: bytes) -> dict[str, str]:
    """The records of a pax header, each a line `LENGTH KEY=VALUE`."""
    fields = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(data):
            break
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        fields[_text(key)] = _text(value)
        data = data[int(length) :]
    return fields
