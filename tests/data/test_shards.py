"""WebDataset shards: what is read from them, what is refused, what is reported."""

import io
import json
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from data_files import pairs, png, python_objects, write_pairs, write_tar

from harmony.data.sources import BadExample, SourceOptions, open_source
from harmony.data.sources.flat import OpenFiles, Strings
from harmony.data.sources.shards import ShardSource
from harmony.errors import UserError


def test_images_captions_and_keys_belong_together(tmp_path: Path) -> None:
    source = open_source(write_pairs(tmp_path, 7, shards=3, captions=2))
    assert len(source) == 7
    for i in range(7):
        example = source[i]
        assert example.key == source.key(i) == f"{i:05d}"
        assert example.image == png(i)
        assert example.captions == [f"caption 0 of picture {i}", f"caption 1 of picture {i}"]
        assert example.label is None
    assert source.problems() == []
    assert source.class_names is None
    with pytest.raises(IndexError):
        source[7]


def test_captions_are_matched_by_key_when_one_is_missing(tmp_path: Path) -> None:
    members = [member for member in pairs(4) if member[0] != "00001.txt"]
    source = ShardSource(str(write_tar(tmp_path / "x.tar", members)))
    assert [source[i].captions for i in range(4)] == [
        ["caption 0 of picture 0"],
        [],
        ["caption 0 of picture 2"],
        ["caption 0 of picture 3"],
    ]


def sample(**files: bytes) -> list[tuple[str, bytes]]:
    return [("a.jpg", b"image")] + [(f"a.{ending}", data) for ending, data in files.items()]


@pytest.mark.parametrize(
    ("files", "key", "captions"),
    [
        ({"txt": b"from text"}, None, ["from text"]),
        ({"txt": b"from text", "json": b'{"caption": "from json"}'}, None, ["from text"]),
        ({"json": b'{"caption": "from json"}'}, None, ["from json"]),
        ({"json": b'{"text": "from json"}'}, None, ["from json"]),
        ({"txt": b"one", "json": b'{"captions": ["one", "two"]}'}, None, ["one", "two"]),
        ({"txt": b"from text", "json": b'{"captions": []}'}, None, ["from text"]),
        ({"txt": b"from text", "json": b"[not json"}, None, ["from text"]),
        ({"txt": b"from text", "json": b'["a list"]'}, None, ["from text"]),
        ({"txt": b"from text", "json": b'{"title": ["a", 3, "b", " "]}'}, "title", ["a", "b"]),
        ({"txt": b"from text", "json": b'{"caption": "from json"}'}, "caption", ["from json"]),
        ({"txt": b"from text", "json": b'{"caption": "from json"}'}, "txt", ["from text"]),
        ({"txt": b"from text", "alt": b"from alt"}, "alt", ["from alt"]),
        ({"txt": b" two\n lines\t "}, None, ["two lines"]),
        ({"txt": b"caf\xc3\xa9"}, None, ["café"]),
        ({"txt": b"caf\xe9"}, None, ["caf\ufffd"]),
        ({"txt": b"  \n"}, None, []),
        ({"txt": b""}, None, []),
        ({}, None, []),
    ],
)
def test_where_captions_come_from(
    tmp_path: Path, files: dict[str, bytes], key: str | None, captions: list[str]
) -> None:
    path = write_tar(tmp_path / "x.tar", sample(**files))
    assert ShardSource(str(path), SourceOptions(caption_key=key))[0].captions == captions
    if key:
        assert open_source(f"shards:{path}?caption_key={key}")[0].captions == captions


def test_the_image_is_the_first_known_ending_or_the_one_asked_for(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "x.tar", [("a.depth.png", b"depth"), ("a.webp", b"webp"), ("a.jpeg", b"jpeg"), ("b.png", b"p")]
    )
    assert [ShardSource(str(path))[i].image for i in range(2)] == [b"jpeg", b"p"]
    only = ShardSource(str(path), SourceOptions(image_key="depth.png"))
    assert [only[i].image for i in range(len(only))] == [b"depth"]
    assert only.problems() == ["samples without an image (left out): 1"]


def test_a_source_without_captions_under_the_key_lists_what_it_saw(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", pairs(3, captions=2))
    source = ShardSource(str(path), SourceOptions(caption_key="title"))
    with pytest.raises(
        UserError, match=r"json key 'title'.*saw \.txt, json 'key', json 'captions'; .*data\.caption_key"
    ):
        source.require_captions()
    ShardSource(str(path)).require_captions()


def test_one_caption_among_many_is_enough_to_begin(tmp_path: Path) -> None:
    members = [(f"{i:04d}.jpg", b"x") for i in range(500)] + [("0499.json", b'{"caption": "at last"}')]
    members += [(f"{i:04d}.json", b'{"url": "x"}') for i in range(499)]
    assert ShardSource(str(write_tar(tmp_path / "x.tar", members))).has_captions()


def test_a_tar_of_classes_has_labels_and_says_that_it_has_no_captions(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "x.tar", [("a.jpg", b"A"), ("a.cls", b"1"), ("b.jpg", b"B"), ("b.cls", b"0\n"), ("c.jpg", b"C")]
    )
    source = ShardSource(str(path))
    assert [source[i].label for i in range(3)] == [1, 0, None]
    assert source.class_names is None
    with pytest.raises(UserError, match="only images and classes; use data with captions"):
        source.require_captions()
    (tmp_path / "classes.json").write_text('{"classes": ["cat", "dog"]}')
    assert ShardSource(str(path)).class_names == ["cat", "dog"]
    (tmp_path / "classes.json").write_text('{"classes": ["cat", "dog"], "readable_names": ["a cat", "a dog"]}')
    assert ShardSource(str(path)).class_names == ["a cat", "a dog"]
    (tmp_path / "classes.json").write_text('{"what": 1}')
    with pytest.raises(UserError, match="holds no class names"):
        ShardSource(str(path))
    (tmp_path / "classes.json").unlink()
    (tmp_path / "classnames.txt").write_text("Katze\nHund\n")
    assert ShardSource(str(path)).class_names == ["Katze", "Hund"]


def test_classes_may_be_written_as_names(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"A"), ("a.cls", b"dog"), ("b.jpg", b"B"), ("b.cls", b"cat")])
    source = ShardSource(str(path))
    assert source.class_names == ["cat", "dog"]
    assert [source[i].label for i in range(2)] == [1, 0]
    (tmp_path / "classes.json").write_text('["bird", "dog"]')
    source = ShardSource(str(path))
    assert source[0].label == 1
    with pytest.raises(BadExample, match="class 'cat' is neither a number nor a known name"):
        source[1]


def test_keys_that_come_in_two_shards_are_reported_and_both_used(tmp_path: Path) -> None:
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", [("1.jpg", name.encode()), (f"{name}.jpg", b"x")])
    source = ShardSource(f"{tmp_path}/*.tar")
    assert [source[i].image for i in range(4)] == [b"a", b"x", b"b", b"x"]
    assert source.problems() == ["keys that come in several shards (all are used): 1, as 1"]


def test_a_damaged_shard_gives_what_lies_before_the_damage(tmp_path: Path) -> None:
    uri = write_pairs(tmp_path, 6, shards=2)
    first = tmp_path / "part-00000.tar"
    first.write_bytes(first.read_bytes()[:-12_000])
    source = open_source(uri)
    assert [source.key(i) for i in range(len(source))][-3:] == ["00003", "00004", "00005"]
    assert 3 <= len(source) < 6
    assert all(source[i].captions for i in range(len(source)))
    assert len(source.problems()) == 1
    assert source.problems()[0].startswith("part-00000.tar: it is cut off at byte")


def test_a_shard_that_shrinks_or_goes_while_in_use_gives_bad_examples(tmp_path: Path) -> None:
    source = open_source(write_pairs(tmp_path, 4, shards=2))
    assert source[0].key == "00000"
    os.truncate(tmp_path / "part-00000.tar", 600)
    with pytest.raises(BadExample, match="shorter since it was indexed"):
        source[1]
    (tmp_path / "part-00001.tar").unlink()
    with pytest.raises(BadExample, match=r"cannot be read from part-00001.tar: No such file"):
        source[2]


def test_what_cannot_be_a_source_is_refused(tmp_path: Path) -> None:
    write_pairs(tmp_path, 4, shards=2)
    empty = write_tar(tmp_path / "empty.tar", [])
    texts = write_tar(tmp_path / "texts.tar", [("a.txt", b"x"), ("a.json", b"{}")])
    for place, message in (
        (f"{tmp_path}/part-{{00000..00004}}.tar", r"3 of 5 shards .* missing: .*part-00002.tar, .*; correct the range"),
        (f"{tmp_path}/none-*.tar", "names no shards"),
        (f"{tmp_path}/nowhere.tar", "nowhere.tar is not there"),
        ("", "names no shards"),
        (str(empty), "has no images: .*saw no files"),
        (str(texts), "has no images: .*saw json, txt"),
        ("s3://bucket/train.tar", "is remote; copy the shards"),
    ):
        with pytest.raises(UserError, match=message):
            ShardSource(place)


def test_a_folder_means_the_shards_in_it(tmp_path: Path) -> None:
    write_pairs(tmp_path, 4, shards=2)
    assert len(ShardSource(str(tmp_path))) == 4


def test_the_fingerprint_tells_other_data_but_not_other_places(tmp_path: Path) -> None:
    uris = [write_pairs(tmp_path / str(place), 4, shards=2) for place in range(2)]
    same = {open_source(uri).fingerprint() for uri in uris}
    assert len(same) == 1
    other = write_pairs(tmp_path / "other", 5, shards=2)
    assert open_source(other).fingerprint() not in same
    (tmp_path / "0" / "part-00000.tar").rename(tmp_path / "0" / "new.tar")
    assert ShardSource(f"{tmp_path}/0/*.tar").fingerprint() not in same


def _images(source: ShardSource) -> list[object]:
    return [source[i].image for i in range(len(source))]


def test_other_processes_and_threads_read_the_same(tmp_path: Path) -> None:
    source = open_source(write_pairs(tmp_path, 12, shards=4))
    expected = [png(i) for i in range(12)]
    assert _images(source) == expected  # all files are open now
    for method in ("fork", "spawn"):
        with get_context(method).Pool(2) as pool:
            assert pool.map(_images, [source, source]) == [expected, expected]
    assert _images(pickle.loads(pickle.dumps(source))) == expected


def test_few_files_are_open_at_a_time_and_threads_never_read_another_file(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(12)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 1000)
    files = OpenFiles(paths, limit=2)
    numbers = np.random.default_rng(0).integers(0, 12, 3000).tolist()
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda number: files.read(number, 500, 10), numbers))
    assert read == [bytes([number]) * 10 for number in numbers]
    assert len(files._open) == 2


def test_the_index_holds_no_python_object_an_example(tmp_path: Path) -> None:
    small, large = (open_source(write_pairs(tmp_path / str(count), count, captions=2)) for count in (4, 400))
    assert len(large) == 400
    assert python_objects(large) == python_objects(small)


def test_strings_are_kept_flat_whatever_they_are() -> None:
    written = ["", "a", "é", "日本", "x" * 1000, b"\xff\xfe".decode("utf-8", "surrogateescape"), ""]
    strings = Strings.of(written)
    assert list(strings) == written
    assert strings[1:3] == ["a", "é"]
    assert list(Strings.joined([strings, Strings.of([]), strings])) == written * 2
    assert list(strings.taken(np.array([3, 0, 3]))) == ["日本", "", "日本"]
    with pytest.raises(IndexError):
        strings[7]


def test_flickr8k(shared: Path) -> None:
    train = open_source(f"shards:{shared}/data/captions/flickr8k/train-{{00000..00011}}.tar")
    val = open_source(f"shards:{shared}/data/captions/flickr8k/val-*.tar")
    assert (len(train), len(val)) == (5999, 1000)
    assert train.problems() == val.problems() == []
    captions = [len(val[i].captions) for i in range(len(val))]
    assert sum(captions) == 4999
    assert set(captions) <= {4, 5}
    assert sum(len(train[i].captions) for i in range(len(train))) == 29_987
    with tarfile.open(shared / "data/captions/flickr8k/train-00007.tar") as tar:
        example = train[7 * 500 + 123]
        for ending, expected in (("jpg", example.image), ("txt", example.captions[0].encode())):
            member = tar.extractfile(f"{example.key}.{ending}")
            assert member is not None
            assert member.read().rstrip(b"\n") == expected
        metadata = tar.extractfile(f"{example.key}.json")
        assert metadata is not None
        assert json.load(io.TextIOWrapper(metadata))["captions"] == example.captions


def test_clothing10(shared: Path) -> None:
    source = open_source(f"shards:{shared}/data/classification/clothing10/train-*.tar")
    counts = json.loads((shared / "data/classification/clothing10/classes.json").read_text())["counts"]["train"]
    labels = np.bincount([source[i].label for i in range(len(source))])
    assert labels.tolist() == list(counts.values())
    assert source.class_names is not None
    assert source.class_names[4] == "pair of pants"
    with pytest.raises(UserError, match="only images and classes"):
        source.require_captions()
