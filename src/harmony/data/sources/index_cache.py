"""The index of a tar file kept on disk, so that a shard's headers are read once.

It lies beside the shard (`NAME.tar.index.npz`), or in the user's cache folder where the shard's cannot be written to.
It holds the shard's size and time of change, and is made anew when they differ or when it cannot be read.
"""

import contextlib
import hashlib
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from harmony.data.sources.flat import Strings
from harmony.data.sources.tar_index import TarIndex, scan_tar

FORMAT = 1
"""Of the cached index; raise it when the index changes, and old ones are made anew."""


def tar_index(path: Path) -> TarIndex:
    """The index of one shard, from the cache or from its headers (it is then cached, where that can be)."""
    places = cache_places(path)
    for place in places:
        index = _load(place, path)
        if index is not None:
            return index
    before = stamp(path)
    index = scan_tar(path)
    for place in places:
        if _save(index, before, place):
            break
    return index


def cache_places(path: Path) -> list[Path]:
    """Where the index of a shard may be kept, in order of preference."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "harmony" / "index"
    digest = hashlib.blake2b(os.fsencode(path.resolve()), digest_size=16).hexdigest()
    in_home = home / f"{digest}.npz"
    return [path.with_name(f"{path.name}.index.npz"), in_home] if _writable(path.parent) else [in_home]


def _writable(folder: Path) -> bool:
    # The mode counts even for the superuser: a folder whose owner took every right to write away is to stay as it is.
    return os.access(folder, os.W_OK) and bool(folder.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))


def stamp(path: Path) -> np.ndarray:
    status = path.stat()
    return np.array([FORMAT, status.st_size, status.st_mtime_ns], dtype=np.int64)


def _load(place: Path, path: Path) -> TarIndex | None:
    """What is cached at `place` when it is whole and of this very file, else None."""
    try:
        with np.load(place, allow_pickle=False) as arrays:
            if not np.array_equal(arrays["stamp"], stamp(path)):
                return None
            index = TarIndex(
                keys=Strings(arrays["keys"], arrays["key_ends"]),
                hashes=arrays["hashes"],
                endings=[str(ending) for ending in arrays["endings"]],
                sample=arrays["sample"],
                ending=arrays["ending"],
                offset=arrays["offset"],
                size=arrays["size"],
                problems=[str(problem) for problem in arrays["problems"]],
            )
    except Exception:  # whatever a broken file brings about, the answer is the same: make the index anew
        return None
    return index if _is_sound(index) else None


def _is_sound(index: TarIndex) -> bool:
    members, samples = len(index.sample), len(index.keys)
    return (
        {len(index.ending), len(index.offset), len(index.size)} == {members}
        and len(index.hashes) == samples
        and (samples == 0 or int(index.keys.ends[-1]) == len(index.keys.data))
        and (members == 0 or int(index.sample.max()) < samples)
        and (members == 0 or int(index.ending.max()) < len(index.endings))
    )


def _save(index: TarIndex, stamp: np.ndarray, place: Path) -> bool:
    """Write aside and rename, so that no reader meets half an index; False where it cannot be written."""
    arrays: dict[str, Any] = {
        "stamp": stamp,
        "keys": index.keys.data,
        "key_ends": index.keys.ends,
        "hashes": index.hashes,
        "endings": np.array(index.endings, dtype=np.str_),
        "sample": index.sample,
        "ending": index.ending,
        "offset": index.offset,
        "size": index.size,
        "problems": np.array(index.problems, dtype=np.str_),
    }
    aside = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place.parent, prefix=".index-", suffix=".npz", delete=False) as file:
            aside = Path(file.name)
            np.savez(file, **arrays)
        aside.chmod(0o644)
        aside.replace(place)
    except OSError:
        if aside is not None:
            with contextlib.suppress(OSError):
                aside.unlink()
        return False
    return True
