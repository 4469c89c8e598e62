"""The index of a tar file against Python's own reader, whole and damaged."""

import gzip
import io
import tarfile
from pathlib import Path

import pytest
from data_files import pairs, write_tar
from hypothesis import given
from hypothesis import strategies as st

from harmony.data.sources.tar_index import TarIndex, scan_tar
from harmony.errors import UserError

FORMATS = [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]


def as_dict(index: TarIndex) -> dict[tuple[str, str], tuple[int, int]]:
    """(key, ending) -> (offset, size)."""
    return {
        (index.keys[int(sample)], index.endings[int(ending)]): (int(offset), int(size))
        for sample, ending, offset, size in zip(index.sample, index.ending, index.offset, index.size, strict=True)
    }


def plainly(path: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """The same by the standard library, for names with one dot."""
    with tarfile.open(path) as tar:
        members = [member for member in tar if member.isfile()]
    return {tuple(m.name.rsplit(".", 1)): (m.offset_data, m.size) for m in members}


stems = st.text("abcxyz0123456789_-é", min_size=1, max_size=150).map(lambda stem: stem.strip("-") or "x")
folders = st.sampled_from(["", "images/", "a/b/", "a" * 90 + "/"])
names = st.builds(
    lambda folder, stem, ending: f"{folder}{stem}.{ending}", folders, stems, st.sampled_from(["jpg", "txt"])
)


@given(st.lists(names, unique=True, min_size=1, max_size=8), st.sampled_from(FORMATS[1:]), st.randoms())
def test_the_index_equals_what_the_standard_library_reads(tmp_path_factory, names, form, random) -> None:
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    write_tar(path, [(name, random.randbytes(random.choice([0, 1, 511, 512, 513, 20_000]))) for name in names], form)
    index = scan_tar(path)
    assert as_dict(index) == plainly(path)
    assert index.problems == []


def test_long_names_in_two_parts_are_joined(tmp_path: Path) -> None:
    name = "/".join(["folder" * 5] * 4) + "/image"
    path = write_tar(tmp_path / "x.tar", [(f"{name}.jpg", b"pixels")], tarfile.USTAR_FORMAT)
    assert as_dict(scan_tar(path)) == plainly(path)


def test_what_is_no_sample_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("images", tarfile.DIRTYPE), ("link.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "images/a.jpg"
            tar.addfile(entry)
        for name in ("./images/a.jpg", "README", ".hidden.jpg", "images/._a.jpg"):
            entry = tarfile.TarInfo(name)
            entry.size = 3
            tar.addfile(entry, io.BytesIO(b"abc"))
    assert list(as_dict(scan_tar(path))) == [("images/a", "jpg")]


def test_endings_are_everything_behind_the_first_dot(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("v1.0/a.seg.png", b"1"), ("v1.0/a.JPG", b"2")])
    assert list(as_dict(scan_tar(path))) == [("v1.0/a", "seg.png"), ("v1.0/a", "jpg")]


def test_files_of_a_sample_belong_together_wherever_they_are(tmp_path: Path) -> None:
    images, texts = [("b.jpg", b"B"), ("a.jpg", b"A"), ("c.jpg", b"C")], [("c.txt", b"c"), ("a.txt", b"a")]
    index = scan_tar(write_tar(tmp_path / "x.tar", images + texts))
    assert list(index.keys) == ["b", "a", "c"]
    offset, size = index.column("txt")
    assert (offset >= 0).tolist() == [False, True, True]
    data = (tmp_path / "x.tar").read_bytes()
    assert [data[o : o + s] for o, s in zip(offset[1:], size[1:], strict=True)] == [b"a", b"c"]


def test_a_file_that_comes_twice_is_reported_and_the_first_used(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"first"), ("b.jpg", b"other"), ("a.jpg", b"second")])
    index = scan_tar(path)
    assert index.size.tolist() == [5, 5]
    assert index.problems == ["x.tar: files that come twice (the first is used): 1, as a.jpg"]


SAMPLES = pairs(6, captions=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_tar(tmp_path_factory.mktemp("tar") / "x.tar", SAMPLES).read_bytes()


@given(st.data())
def test_a_tar_cut_short_gives_the_samples_before_the_cut(tmp_path_factory, whole: bytes, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    path.write_bytes(whole)
    everything = as_dict(scan_tar(path))
    ends = [offset + size for offset, size in everything.values()]
    cut = data.draw(st.integers(512, max(ends) - 1))
    path.write_bytes(whole[:cut])
    index = scan_tar(path)
    kept = as_dict(index)
    assert all(everything[name] == place for name, place in kept.items())
    complete = sum(ends[3 * sample + 2] <= cut for sample in range(6))  # each sample is three files
    assert complete <= len(index.keys) <= complete + (complete == 0)  # a first sample has none to compare it with
    assert len(index.problems) == 1
    assert "x.tar: it " in index.problems[0]
    assert f"{len(index.keys)} " in index.problems[0]


def test_a_damaged_header_ends_the_shard_and_says_where(tmp_path: Path, whole: bytes) -> None:
    third = whole.index(b"00002.png")
    damaged = bytearray(whole)
    damaged[third + 130] ^= 0x55
    path = tmp_path / "x.tar"
    path.write_bytes(bytes(damaged))
    index = scan_tar(path)
    assert list(index.keys) == ["00000", "00001"]
    assert index.problems == [f"x.tar: it is damaged at byte {third} of {len(whole)}; the 2 samples before are used"]


def test_a_tar_without_an_end_mark_is_whole_but_mentioned(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "x.tar"
    offset, size = max(as_dict(scan_tar(_written(path, whole))).values())
    index = scan_tar(_written(path, whole[: offset + -(-size // 512) * 512]))
    assert len(index.keys) == 6
    assert "no end mark" in index.problems[0]


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (gzip.compress(b"x" * 5000, mtime=0), "compressed with gzip"),
        (b"<html>" * 200, "not a tar file"),
        (b"\xff" * 4096, "not a tar file"),
    ],
)
def test_what_is_no_tar_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        scan_tar(_written(tmp_path / "x.tar", data))


@given(st.data())
def test_no_damage_whatever_breaks_the_reader(tmp_path_factory, whole: bytes, data: st.DataObject) -> None:
    damaged = bytearray(whole[:20_000])
    for place in data.draw(st.lists(st.integers(512, len(damaged) - 1), min_size=1, max_size=20)):
        damaged[place] = data.draw(st.integers(0, 255))
    path = _written(tmp_path_factory.mktemp("tar") / "x.tar", bytes(damaged))
    index = scan_tar(path)
    assert all(0 <= offset <= offset + size <= len(damaged) for offset, size in as_dict(index).values())
    assert index.problems


def test_sizes_beyond_octal_are_read(tmp_path: Path) -> None:
    """A GNU header whose size is binary, and a pax header that overrides it."""
    path = write_tar(tmp_path / "gnu.tar", [("a.jpg", b"abc")], tarfile.GNU_FORMAT)
    data = bytearray(path.read_bytes())
    data[124:136] = b"\x80" + (3).to_bytes(11, "big")
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data[:512]):06o}\0 ".encode()
    path.write_bytes(bytes(data))
    assert as_dict(scan_tar(path)) == {("a", "jpg"): (512, 3)}
    with tarfile.open(tmp_path / "pax.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        entry = tarfile.TarInfo("a.jpg")
        entry.size, entry.pax_headers = 3, {"size": "3", "path": "b.jpg"}
        tar.addfile(entry, io.BytesIO(b"abc"))
    assert as_dict(scan_tar(tmp_path / "pax.tar")) == {("b", "jpg"): (1536, 3)}
