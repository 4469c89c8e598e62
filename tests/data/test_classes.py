"""Lists of classes, and labels written as names."""

from pathlib import Path

import pytest
from data_files import png, write_tar

from harmony.data.sources import BadExample, open_source
from harmony.data.sources.classes import find_class_list, label_of, read_classes
from harmony.errors import UserError


def test_readable_names_are_for_people_and_the_others_for_the_data(tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    path.write_text('{"classes": ["longsleeve", "hat"], "readable_names": ["long-sleeve top", "a hat"], "counts": {}}')
    classes = read_classes(path)
    assert classes.names == ["long-sleeve top", "a hat"]
    assert classes.written == ["longsleeve", "hat"]
    assert classes.ignore_index is None
    assert find_class_list(tmp_path) == classes
    members = [("a.png", png(0)), ("a.cls", b"hat"), ("b.png", png(1)), ("b.cls", b"longsleeve"), ("c.png", png(2))]
    write_tar(tmp_path / "x.tar", [*members, ("c.cls", b"1"), ("d.png", png(3)), ("d.cls", b"shoe")])
    source = open_source(f"shards:{tmp_path}/x.tar")
    assert source.class_names == ["long-sleeve top", "a hat"]
    assert [source[i].label for i in range(3)] == [1, 0, 1]
    with pytest.raises(BadExample, match="its class 'shoe' is neither a number nor a known name"):
        source[3]
    (tmp_path / "t.csv").write_text("image,label\na.png,hat\n")
    (tmp_path / "a.png").write_bytes(png(0))
    assert open_source(f"table:{tmp_path}/t.csv")[0].label == 1


def test_what_the_data_writes_comes_before_what_people_read() -> None:
    assert label_of("bat", ["animal bat", "bat"], "k", ["bat", "club"]) == 0
    assert label_of("animal bat", ["animal bat", "bat"], "k", ["bat", "club"]) == 0


def test_texts_have_a_name_a_line(tmp_path: Path) -> None:
    assert find_class_list(tmp_path) is None
    (tmp_path / "classnames.txt").write_text("\ufeffa cat\n\n a dog \n")
    found = find_class_list(tmp_path)
    assert found is not None and found.names == found.written == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("c.txt", b"\n \n", "holds no class names; write one a line"),
        ("c.txt", b"caf\xe9", "cannot be read as text"),
        ("c.json", b'["a", 1]', r'holds no class names; write \["cat", "dog"\]'),
        ("c.json", b"[]", "holds no class names"),
        ("c.json", b'{"readable_names": ["a"], "classes": ["a", "b"]}', "has 1 readable_names for 2 classes"),
    ],
)
def test_lists_that_are_none_are_one_sentence(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_classes(tmp_path / name)


def test_the_real_list(shared: Path) -> None:
    source = open_source(f"shards:{shared}/data/classification/clothing10/test-00000.tar")
    assert source.class_names is not None and source.class_names[2] == "long-sleeve top"
