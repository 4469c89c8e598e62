"""From patterns to files."""

from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmony.data.sources.places import expand_braces, find_files
from harmony.errors import UserError

plain = st.text("abc/._-", max_size=5)


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("a.tar", ["a.tar"]),
        ("a{0..2}", ["a0", "a1", "a2"]),
        ("a{08..11}.tar", ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]),
        ("a{000..2}", ["a000", "a001", "a002"]),
        ("a{2..0}", ["a2", "a1", "a0"]),
        ("{a,b}{1..2}", ["a1", "a2", "b1", "b2"]),
        ("{a,b{1..2}}c", ["ac", "b1c", "b2c"]),
        ("{a}", ["{a}"]),
        ("{}x{1,}", ["{}x1", "{}x"]),
        ("a{0..1", ["a{0..1"]),
    ],
)
def test_braces(pattern: str, paths: list[str]) -> None:
    assert expand_braces(pattern) == paths


@given(st.lists(st.tuples(plain, st.lists(plain, min_size=2, max_size=3)), min_size=1, max_size=3), plain)
def test_braces_give_every_combination_in_order(parts: list[tuple[str, list[str]]], end: str) -> None:
    pattern = "".join(f"{before}{{{','.join(choices)}}}" for before, choices in parts) + end
    chosen = product(*(choices for _, choices in parts))
    expected = ["".join(b + c for (b, _), c in zip(parts, choice, strict=True)) + end for choice in chosen]
    assert expand_braces(pattern) == expected


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a-1.tar", "a-2.tar", "a-10.tar", "b.tar", "deep/c.tar", "odd{1..2}.tar", "x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("b.tar", ["b.tar"]),
        ("a-*.tar", ["a-1.tar", "a-10.tar", "a-2.tar"]),
        ("a-?.tar", ["a-1.tar", "a-2.tar"]),
        ("a-[2-9].tar", ["a-2.tar"]),
        ("{b,a-1}.tar", ["b.tar", "a-1.tar"]),
        ("{a-*,b}.tar", ["a-1.tar", "a-10.tar", "a-2.tar", "b.tar"]),
        ("{b,*}.tar", ["b.tar", "a-1.tar", "a-10.tar", "a-2.tar", "odd{1..2}.tar"]),
        ("**/c.tar", ["deep/c.tar"]),
        ("odd{1..2}.tar", ["odd{1..2}.tar"]),
        ("deep", ["deep/c.tar"]),
    ],
)
def test_patterns_find_files_each_once(folder: Path, pattern: str, names: list[str]) -> None:
    assert find_files(f"{folder}/{pattern}", "shards:x", "shards", ".tar") == [folder / name for name in names]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("c-*.tar", "names no shards"),
        ("a-{1-5}.tar", r"correct the path, or the range, which is written \{00000\.\.00012\}"),
        ("a-{1..5}.tar", r"3 of 5 shards of shards:x are missing: .*a-3.tar, .*a-4.tar, .*a-5.tar; correct the range"),
        ("a-{1..20}.tar", r"17 of 20 .*, \.\.\.; correct"),
        ("{b,zzz*}.tar", r"1 of 2 shards of shards:x are missing: .*zzz\*.tar"),
        ("deep/deeper", "is not there"),
        ("empty.tar", r"names a folder without \*\.tar files; for a folder of image files write folder:.*/empty\.tar"),
        ("a-{1..2.tar", r"brace that is not closed.*\{00000\.\.00009\}"),
        ("{b,a-1}.tar{", "brace that is not closed"),
    ],
)
def test_missing_files_are_named(folder: Path, pattern: str, message: str) -> None:
    (folder / "empty.tar").mkdir()
    with pytest.raises(UserError, match=message):
        find_files(f"{folder}/{pattern}", "shards:x", "shards", ".tar")


def test_the_home_folder_may_be_written_as_a_tilde(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert find_files("~/b.tar", "x", "shards", ".tar") == [folder / "b.tar"]
