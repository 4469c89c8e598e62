"""What `harmony data inspect` and `harmony data index` find and say."""

import io
import json
from pathlib import Path

import pytest
from data_files import pairs, png, write_images, write_pairs, write_tar, write_texts
from PIL import Image
from rich.console import Console

from harmony.data import inspect
from harmony.data.sheet import SIDE, Picture, draw_sheet
from harmony.data.sources import SourceOptions
from harmony.errors import UserError


def printed(uri: str, **settings: object) -> str:
    stream = io.StringIO()
    inspect.show(uri, console=Console(file=stream, width=100), **settings)  # type: ignore[arg-type]
    return stream.getvalue()


@pytest.fixture
def mixed(tmp_path: Path) -> str:
    """Six pairs: one image is a web page, one is cut, one lacks its caption; sizes and captions differ."""
    members = []
    for name, data in pairs(6, captions=2):
        if name == "00001.png":
            data = b"<html>"
        elif name == "00002.png":
            data = data[:300]
        elif name == "00003.png":
            data = png(3, (80, 20))
        if name not in ("00004.txt", "00004.json"):
            members.append((name, data))
    return f"shards:{write_tar(tmp_path / 'x.tar', [*members, ('readme.txt', b'x')])}"


def test_everything_is_counted(mixed: str) -> None:
    found = inspect.inspect(mixed)
    assert (found.examples, found.looked_at) == (6, 6)
    assert sorted(zip(found.widths, found.heights, strict=True)) == [(40, 32), (40, 32), (40, 32), (80, 20)]
    assert found.file_sizes == [len(png(0)), len(png(3, (80, 20))), len(png(4)), len(png(5))]
    assert found.captions_each == [2, 2, 2, 2, 0, 2]  # of the pairs with a bad image, too
    assert found.words == [5] * 10
    assert found.tokens == [7] * 10
    assert [key for key, _ in found.bad] == ["00001", "00002"]
    assert found.bad[0][1] == "is not an image (a web page)"
    assert found.bad[1][1].startswith("is truncated")
    assert found.problems == ["samples without an image (left out): 1"]
    assert [picture.words for picture in found.pictures] == [
        "caption 0 of picture 0",
        "caption 0 of picture 3",
        "00004",
        "caption 0 of picture 5",
    ]


def test_what_is_printed_says_it(mixed: str) -> None:
    text = " ".join(printed(mixed).split())
    for expected in (
        mixed,
        "examples 6 ",
        "good 4 of 6",
        "width 40 to 80 px, median 40",
        "height 20 to 32 px, median 32",
        "captions 10; 0 to 2, median 2 an image; 1 without",
        "words 5 ",
        "tokens 7; 0 longer than 77",
        "problem samples without an image (left out): 1",
        "bad 1 x is not an image (a web page), as 00001",
    ):
        assert expected in text


def test_classes_are_counted_by_name(tmp_path: Path) -> None:
    write_images(tmp_path, ["dog/1.png", "dog/2.png", "cat/1.png"])
    found = inspect.inspect(f"folder:{tmp_path}")
    assert found.labels == {"cat": 1, "dog": 2}
    assert [picture.words for picture in found.pictures] == ["cat", "dog", "dog"]
    text = printed(f"folder:{tmp_path}")
    assert "2: cat 1, dog 2" in text
    assert "none; seen: only images" in text


def test_a_part_of_large_data_is_looked_at(tmp_path: Path) -> None:
    uri = write_pairs(tmp_path, 30)
    found = inspect.inspect(uri, most=7)
    assert (found.examples, found.looked_at, len(found.widths)) == (30, 7, 7)
    assert "7, spread evenly" in printed(uri, most=7)
    assert inspect.inspect(uri, most=None).looked_at == 30


def test_data_that_is_bad_throughout_is_described_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    text = printed(f"folder:{tmp_path}", sheet=tmp_path / "sheet.png")
    assert "good 0 of 1" in " ".join(text.split())
    assert "bad 1 x is empty (0 bytes), as a" in " ".join(text.split())
    assert Image.open(tmp_path / "sheet.png").size[0] > 100


def test_fields_are_listed_when_the_key_is_wrong(mixed: str) -> None:
    text = printed(mixed, options=SourceOptions(caption_key="title"))
    assert "none; seen: .txt, json 'key', json 'captions'" in text


def test_the_sheet_shows_the_images(tmp_path: Path) -> None:
    for place, colour in enumerate(("red", "lime", "blue")):
        Image.new("RGB", (30, 15), colour).save(tmp_path / f"{place}.png")
    write_texts(tmp_path, {"0.txt": "a red one 日本 " * 30, "1.txt": "", "2.txt": "blue"})
    sheet = tmp_path / "deep" / "sheet.png"
    sheet.parent.mkdir()
    inspect.show(f"folder:{tmp_path}?image_key=png", sheet, console=Console(file=io.StringIO()))
    drawn = Image.open(sheet)
    colours = {colour for _, colour in drawn.getcolors(10**6)}
    assert {(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)} <= colours
    assert min(colours, key=sum) < (60, 60, 60)  # words are black
    assert [path.name for path in sheet.parent.iterdir()] == ["sheet.png"]


@pytest.mark.parametrize("size", [(3000, 2), (2, 3000), (1, 1), (400, 100)])
def test_images_of_any_shape_have_their_place_on_the_sheet(size: tuple[int, int]) -> None:
    small = inspect.thumbnail(inspect.decode(png(0, size)))
    scale = SIDE / max(size)
    assert small.shape == (3, max(1, round(size[1] * scale)), max(1, round(size[0] * scale)))


def test_captions_are_counted_where_no_image_is_good(tmp_path: Path) -> None:
    members = [(name, b"<html>" if name.endswith(".png") else data) for name, data in pairs(4)]
    found = inspect.inspect(f"shards:{write_tar(tmp_path / 'x.tar', members)}")
    assert (len(found.bad), found.widths, found.captions_each) == (4, [], [1] * 4)


def test_captions_of_images_that_cannot_be_read_are_not_said_to_be_none(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png", "c.png"])
    write_texts(tmp_path, {"a.txt": "a caption"})
    (tmp_path / "b.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "a.png").unlink()
    (tmp_path / "a.png").symlink_to(tmp_path / "nowhere.png")
    text = " ".join(printed(f"folder:{tmp_path}").split())
    assert "none of the examples that could be read, but others have some" in text


def test_a_sheet_in_no_folder_is_refused_before_the_look(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"there is no folder {tmp_path}/no; name another file"):
        inspect.show("folder:nowhere", tmp_path / "no" / "sheet.png")
    with pytest.raises(UserError, match="which is a folder; name a file in it"):
        inspect.show("folder:nowhere", tmp_path)


def test_a_sheet_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    picture = Picture(inspect.thumbnail(inspect.decode(png(0))), "words")
    with pytest.raises(UserError, match="the sheet cannot be written to"):
        draw_sheet([picture], tmp_path / "file" / "sheet.png")


def test_indexing_builds_the_index_of_every_shard(tmp_path: Path) -> None:
    uri = write_pairs(tmp_path, 9, shards=3)
    stream = io.StringIO()
    done = inspect.show_index(uri, Console(file=stream, width=300))
    assert (done.shards, done.examples, done.problems) == (3, 9, [])
    assert done.place == tmp_path / "part-00000.tar.index.npz"
    assert len(list(tmp_path.glob("*.index.npz"))) == 3
    assert "3 shards with 9 examples are indexed" in stream.getvalue()


def test_indexing_tells_what_is_damaged(tmp_path: Path) -> None:
    uri = write_pairs(tmp_path, 4)
    shard = tmp_path / "part-00000.tar"
    shard.write_bytes(shard.read_bytes()[:-12_000])
    stream = io.StringIO()
    inspect.show_index(uri, Console(file=stream, width=300))
    assert "part-00000.tar: it is cut off at byte" in stream.getvalue()


def test_other_data_needs_no_index(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png"])
    stream = io.StringIO()
    done = inspect.show_index(f"folder:{tmp_path}", Console(file=stream, width=300))
    assert (done.shards, done.examples, done.place) == (0, 1, None)
    assert "needs no index" in stream.getvalue()


def test_scenes_can_be_looked_at() -> None:
    found = inspect.inspect("scenes:val?count=5&size=32")
    assert (found.examples, len(found.widths), found.bad) == (5, 5, [])
    assert found.file_sizes == []
    assert sum(found.labels.values()) == 5


def test_classes_of_pixels_are_counted_with_those_of_none(tmp_path: Path) -> None:
    write_images(tmp_path, ["images/a.png", "images/b.png"])
    for name, ignored in (("a", 0), ("b", 255)):
        mask = Image.new("L", (40, 32), 1)
        mask.paste(ignored, (0, 0, 40, 16))
        (tmp_path / "masks").mkdir(exist_ok=True)
        mask.save(tmp_path / "masks" / f"{name}.png")
    (tmp_path / "classes.json").write_text('["sky", "road", "car"]')
    found = inspect.inspect(f"masks:{tmp_path}")
    assert found.mask_pixels == {"sky": 640, "road": 1280, "car": 0, "no class": 640}
    text = " ".join(printed(f"masks:{tmp_path}").split())
    assert "mask classes 3, 2 seen; pixels: sky 25.0 %, road 50.0 %, car 0.0 %, no class 25.0 %" in text


def test_of_many_classes_of_pixels_some_are_named_and_none_is_last(tmp_path: Path) -> None:
    write_images(tmp_path, ["images/a.png"])
    (tmp_path / "masks").mkdir()
    Image.new("L", (40, 32), 255).save(tmp_path / "masks" / "a.png")
    text = " ".join(printed(f"masks:{tmp_path}?classes=90").split())
    assert "90, 0 seen; pixels: class 0 0.0 %" in text
    assert "class 19 0.0 %, no class 100.0 %, ..." in text


def test_things_are_counted_by_class(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png", "b.png"])
    things = [
        {"id": i, "image_id": 1, "category_id": kind, "bbox": [1, 1, 5, 5], "iscrowd": kind == 2}
        for i, kind in enumerate((1, 1, 2, 9))
    ]
    content = {
        "images": [
            {"id": i, "file_name": f"{name}.png", "width": 40, "height": 32} for i, name in ((1, "a"), (2, "b"))
        ],
        "annotations": things,
        "categories": [{"id": i, "name": name} for i, name in ((1, "cat"), (2, "dog"), (3, "owl"))],
    }
    (tmp_path / "i.json").write_text(json.dumps(content))
    found = inspect.inspect(f"coco:{tmp_path}/i.json")
    assert (found.things, found.things_each, found.crowds) == ({"cat": 2, "dog": 1}, [3, 0], 1)
    text = " ".join(printed(f"coco:{tmp_path}/i.json").split())
    assert "things 3 (boxes alone); 0 to 3, median 0 an image; 1 crowds" in text
    assert "thing classes 2: cat 2, dog 1" in text
    assert "problem annotations of categories that are not listed (left out): 1, as annotation 3" in text


def test_the_things_of_scenes_have_masks() -> None:
    found = inspect.inspect("scenes:val?count=4&size=32&things=shape")
    assert sum(found.things.values()) == sum(found.things_each) >= 4
    assert found.object_masks and sum(found.mask_pixels.values()) == 4 * 32 * 32


def test_captions_with_bytes_that_are_not_utf8_are_counted(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(png(1, (30, 20)))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe a caption")
    (tmp_path / "b.txt").write_text("another one")
    assert inspect.inspect(f"folder:{tmp_path}").damaged_captions == 1
    assert "1 with bytes that are not UTF-8" in printed(f"folder:{tmp_path}")
