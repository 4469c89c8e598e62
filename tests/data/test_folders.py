"""Folders of images, with captions beside them or named after classes."""

from pathlib import Path

import pytest
from data_files import encoded, picture, png, python_objects, write_images, write_texts

from harmony.data.sources import BadExample, SourceOptions, open_source
from harmony.data.sources.folders import FolderSource
from harmony.errors import UserError


def test_captions_beside_the_images_are_matched_by_name(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png", "b.png", "sub/c.png", "d.e.png"])
    texts = {"a.txt": "one\n\n two \n", "sub/c.json": '{"captions": ["x", "y"], "caption": "z"}', "d.e.txt": "four"}
    write_texts(tmp_path, texts)
    source = open_source(f"folder:{tmp_path}")
    assert [source.key(i) for i in range(4)] == ["a", "b", "d.e", "sub/c"]
    assert [source[i].captions for i in range(4)] == [["one", "two"], [], ["four"], ["x", "y"]]
    assert [source[i].image for i in range(4)] == [png(0), png(1), png(3), png(2)]
    assert source.class_names is None
    assert [source[i].label for i in range(4)] == [None] * 4
    assert source.problems() == ["images without a caption file: 1"]
    source.require_captions()
    with pytest.raises(IndexError):
        source[4]


def test_a_caption_without_an_image_shifts_nothing(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png", "c.png"])
    write_texts(tmp_path, {"a.txt": "a", "b.txt": "b", "c.txt": "c", "readme.txt": "read me"})
    source = FolderSource(str(tmp_path))
    assert [source[i].captions for i in range(2)] == [["a"], ["c"]]
    assert source.problems() == ["text or json files without an image: 2"]


def test_sub_folders_are_classes_where_there_are_no_captions(tmp_path: Path) -> None:
    write_images(tmp_path, ["dog/1.png", "cat/1.png", "cat/deep/2.png", "0.png"])
    (tmp_path / "empty").mkdir()
    source = FolderSource(str(tmp_path))
    assert source.class_names == ["cat", "dog"]
    labels = {source.key(i): source[i].label for i in range(len(source))}
    assert labels == {"0": None, "cat/1": 0, "cat/deep/2": 0, "dog/1": 1}
    assert source.problems() == ["images outside the class folders (no label): 1"]
    with pytest.raises(UserError, match="saw only images and classes; use data with captions"):
        source.require_captions()


def test_keys_of_json_files_may_be_named_and_are_listed_when_wrong(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png", "b.png"])
    write_texts(tmp_path, {"a.json": '{"titel": "A", "url": "x"}', "b.json": "not json"})
    source = FolderSource(str(tmp_path))
    with pytest.raises(UserError, match=r"saw json 'titel', json 'url'; name the right one with data\.caption_key"):
        source.require_captions()
    source = FolderSource(str(tmp_path), SourceOptions(caption_key="titel"))
    source.require_captions()
    assert [source[i].captions for i in range(2)] == [["A"], []]


def test_text_files_can_be_preferred(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png"])
    write_texts(tmp_path, {"a.json": '{"caption": "from json"}', "a.txt": "from text"})
    for key, captions in ((None, ["from text"]), ("txt", ["from text"]), ("caption", ["from json"])):
        assert FolderSource(str(tmp_path), SourceOptions(caption_key=key))[0].captions == captions


def test_two_images_of_one_name_are_reported(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png", "a.jpg"])
    source = FolderSource(str(tmp_path))
    assert len(source) == 1
    assert source[0].image == encoded(picture(1), "JPEG")
    assert source.problems() == ["images that share a name (the first is used): 1, as a.png"]
    assert FolderSource(str(tmp_path), SourceOptions(image_key="png"))[0].image == png(0)


def test_endings_count_whatever_their_case_and_hidden_files_do_not(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.PNG", ".b.png", ".hidden/c.png", "d.webp"])
    source = FolderSource(str(tmp_path))
    assert [source.key(i) for i in range(len(source))] == ["a", "d"]
    assert source[0].image == png(0)


def test_links_are_followed_but_not_round_in_a_circle(tmp_path: Path) -> None:
    write_images(tmp_path / "real", ["a.png"])
    write_images(tmp_path / "data", ["b.png"])
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data")
    source = FolderSource(str(tmp_path / "data"))
    assert [source.key(i) for i in range(len(source))] == ["b", "linked/a"]


def test_odd_names_are_kept(tmp_path: Path) -> None:
    write_images(tmp_path, ["a b.png", "ü/日本.png", "back\\slash.png", "new\nline.png"])
    source = FolderSource(str(tmp_path))
    assert {source.key(i) for i in range(4)} == {"a b", "ü/日本", "back\\slash", "new\nline"}
    assert {bytes(source[i].image) for i in range(4)} == {png(number) for number in range(4)}


def test_an_image_that_has_gone_is_a_bad_example(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png", "b.png"])
    source = FolderSource(str(tmp_path))
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadExample, match=r"a: a.png cannot be read: No such file"):
        source[0]
    assert source[1].image == png(1)


def test_a_folder_without_images_lists_what_it_saw(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no images: .* saw no files"):
        FolderSource(str(tmp_path))
    write_texts(tmp_path, {"a.txt": "a", "b.csv": "b", "noending": "c"})
    with pytest.raises(UserError, match=r"has no images: looked for \.jpg, .* saw \(none\), \.csv, \.txt"):
        FolderSource(str(tmp_path))


def test_the_fingerprint_tells_other_data_but_not_other_places(tmp_path: Path) -> None:
    places = [write_images(tmp_path / str(number), ["a.png", "b.png"]) for number in range(2)]
    before = FolderSource(str(places[0])).fingerprint()
    assert FolderSource(str(places[1])).fingerprint() == before
    (places[1] / "a.png").write_bytes(b"other")
    (places[0] / "a.png").rename(places[0] / "c.png")
    assert len({before, *(FolderSource(str(place)).fingerprint() for place in places)}) == 3


def test_the_index_holds_no_python_object_an_image(tmp_path: Path) -> None:
    sources = []
    for count in (3, 300):
        for number in range(count):
            path = tmp_path / str(count) / f"{number % 3}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
        sources.append(FolderSource(str(tmp_path / str(count))))
    assert [len(source) for source in sources] == [3, 300]
    assert python_objects(sources[0]) == python_objects(sources[1])
