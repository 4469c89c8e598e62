"""The cached index: where it lies, and that a stale, broken or missing one costs time and nothing else."""

import os
from pathlib import Path

import numpy as np
import pytest
from data_files import pairs, write_tar

from harmony.data.sources.index_cache import cache_places, tar_index
from harmony.data.sources.tar_index import TarIndex, scan_tar


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return write_tar(folder / "train-00000.tar", pairs(3))


def same(one: TarIndex, other: TarIndex) -> bool:
    return (
        list(one.keys) == list(other.keys)
        and one.endings == other.endings
        and one.problems == other.problems
        and all(
            np.array_equal(getattr(one, name), getattr(other, name))
            for name in ("hashes", "sample", "ending", "offset", "size")
        )
    )


def rename_first_key(place: Path) -> None:
    """Change the cached index so that one sees whether it is used."""
    with np.load(place) as file:
        arrays = dict(file)
    arrays["keys"][0] = ord("X")
    np.savez(place, **arrays)


def test_the_index_is_kept_beside_the_shard_and_used(shard: Path) -> None:
    first = tar_index(shard)
    assert same(first, scan_tar(shard))
    place = shard.with_name("train-00000.tar.index.npz")
    assert {path.name for path in shard.parent.iterdir()} == {shard.name, place.name}  # nothing else is left
    assert same(tar_index(shard), first)
    rename_first_key(place)
    assert tar_index(shard).keys[0] == "X0000"


def test_a_changed_shard_gets_a_new_index(shard: Path) -> None:
    tar_index(shard)
    place = cache_places(shard)[0]
    rename_first_key(place)
    status = shard.stat()
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert tar_index(shard).keys[0] == "00000"
    write_tar(shard, pairs(5))
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert len(tar_index(shard).keys) == 5


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "flipped", "other arrays", "wrong numbers"])
def test_a_broken_index_is_made_anew(shard: Path, damage: str) -> None:
    right = tar_index(shard)
    place = cache_places(shard)[0]
    data = place.read_bytes()
    if damage == "other arrays":
        np.savez(place, something=np.arange(3))
    elif damage == "wrong numbers":
        with np.load(place) as file:
            arrays = dict(file)
        arrays["sample"] = arrays["sample"] + 100
        np.savez(place, **arrays)
    else:
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]
        place.write_bytes({"cut": data[:middle], "noise": b"noise" * 50, "empty": b"", "flipped": flipped}[damage])
    assert same(tar_index(shard), right)
    assert same(tar_index(shard), right)
    assert place.read_bytes() != b""


def test_a_folder_that_is_not_to_be_written_to_stays_as_it_is(shard: Path, cache_home: Path) -> None:
    shard.parent.chmod(0o555)
    try:
        first = tar_index(shard)
        assert [path.name for path in shard.parent.iterdir()] == [shard.name]
        (place,) = (cache_home / "harmony" / "index").iterdir()
        rename_first_key(place)
        assert tar_index(shard).keys[0] == "X0000"
        assert first.keys[0] == "00000"
    finally:
        shard.parent.chmod(0o755)


def test_without_any_place_to_keep_it_the_index_is_made_each_time(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    shard.parent.chmod(0o555)
    try:
        assert same(tar_index(shard), scan_tar(shard))
        assert same(tar_index(shard), scan_tar(shard))
    finally:
        shard.parent.chmod(0o755)


def test_shards_of_the_same_name_do_not_share_an_index(tmp_path: Path) -> None:
    shards = []
    for count in (2, 3):
        folder = tmp_path / str(count)
        folder.mkdir()
        shards.append(write_tar(folder / "x.tar", pairs(count)))
        folder.chmod(0o555)
    try:
        for _ in range(2):
            assert [len(tar_index(shard).keys) for shard in shards] == [2, 3]
    finally:
        for shard in shards:
            shard.parent.chmod(0o755)
