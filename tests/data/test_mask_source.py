"""Images with a class for every pixel."""

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import encoded, png, python_objects, write_tar
from PIL import Image

from harmony.data.sources import BadExample, open_source
from harmony.data.sources.read_mask import Coding, read_mask
from harmony.errors import UserError

SIZE = (6, 4)
CLASSES = '{"classes": ["sky", "road", "car"], "ignore_index": 255}'
VALUES = np.array([[0, 1, 2, 255, 0, 1]] * 4, dtype=np.uint8)


def mask_file(values: np.ndarray = VALUES) -> bytes:
    return encoded(Image.fromarray(values))


def put(folder: Path, *names: str, values: np.ndarray = VALUES) -> Path:
    """Write an image or a mask for each name, by its ending."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(mask_file(values) if path.suffix == ".png" else encoded_image())
    return folder


def encoded_image() -> bytes:
    return encoded(Image.new("RGB", SIZE, "red"), "JPEG")


def listed(folder: Path, text: str = CLASSES) -> Path:
    (folder / "classes.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("names", "query", "keys"),
    [
        (["images/a.jpg", "masks/a.png"], "", ["a"]),
        (["images/val/a.jpg", "masks/val/a.png", "images/train/b.jpg", "masks/train/b.png"], "?split=val", ["val/a"]),
        (["val/images/a.jpg", "val/masks/a.png", "train/images/b.jpg", "train/masks/b.png"], "?split=val", ["val/a"]),
        (["images/city/a.jpg", "masks/city/a.png", "images/b.jpg", "masks/b.png"], "", ["b", "city/a"]),
        (["images/a.b.jpg", "masks/a.b.png"], "", ["a.b"]),
        (["JPEGImages/a.jpg", "Seg/a.png"], "?images=JPEGImages&masks=Seg", ["a"]),
        (["set/images/a.jpg", "set/masks/a.png"], "", ["set/a"]),
        (["x/rgb/val/a.jpg", "gt/val/a.png"], "?images=x/rgb&masks=gt&split=val", ["val/a"]),
    ],
)
@pytest.mark.parametrize("tar", [False, True])
def test_folders_and_tars_are_laid_out_in_any_of_the_usual_ways(
    tmp_path: Path, names: list[str], query: str, keys: list[str], tar: bool
) -> None:
    place = listed(put(tmp_path / "data", *names))
    if tar:
        files = [(name, (place / name).read_bytes()) for name in [*names, "classes.json"]]
        place = write_tar(tmp_path / "data.tar", files)
    source = open_source(f"masks:{place}{query}")
    assert [source.key(i) for i in range(len(source))] == keys
    assert source.mask_names == ["sky", "road", "car"]
    assert source.mask_ignore == 255
    assert source.problems() == []
    example = source[0]
    assert example.image == encoded_image()
    assert isinstance(example.mask, np.ndarray) and example.mask.dtype == np.uint8
    np.testing.assert_array_equal(example.mask, VALUES)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[0].mask, VALUES)
    with pytest.raises(IndexError):
        source[len(source)]


ADE = ["images/{0}/ADE_{0}_1.jpg", "annotations/{0}/ADE_{0}_1.png"]


@pytest.mark.parametrize("table", [True, False])
def test_the_folders_of_ade20k(tmp_path: Path, table: bool) -> None:
    values = np.array([[0, 1, 2, 150, 1, 0]] * 4, dtype=np.uint8)
    for split in ("training", "validation"):
        put(tmp_path, *(name.format(split) for name in ADE), values=values)
    if table:
        rows = "".join(f"{i}\t0.1\t1\t1\tname{i}, other {i}\n" for i in range(1, 151))
        (tmp_path / "objectInfo150.txt").write_text(f"Idx\tRatio\tTrain\tVal\tName\n{rows}")
    source = open_source(f"masks:{tmp_path}?split=validation")
    assert [source.key(i) for i in range(len(source))] == ["validation/ADE_validation_1"]
    mask = source[0].mask
    assert mask is not None and mask[0].tolist() == [255, 0, 1, 149, 0, 255]
    assert source.mask_names is not None and len(source.mask_names) == 150
    assert source.mask_names[0] == ("name1" if table else "class 0")
    assert source.mask_ignore == 255
    assert open_source(f"masks:{tmp_path}?split=val").key(0) == source.key(0)
    # Taken as classes, 0 is the first of them.
    as_classes = open_source(f"masks:{tmp_path}?split=val&zero_is=class&classes=151")[0].mask
    assert as_classes is not None and as_classes[0].tolist() == [0, 1, 2, 150, 1, 0]
    with pytest.raises(UserError, match=r"has the splits training, validation; choose one with .split=training"):
        open_source(f"masks:{tmp_path}")
    with pytest.raises(UserError, match="has no split 'test'; choose one of training, validation"):
        open_source(f"masks:{tmp_path}?split=test")


def test_what_has_no_partner_is_counted(tmp_path: Path) -> None:
    put(listed(tmp_path), "images/a.jpg", "images/b.jpg", "images/c.jpg", "masks/b.png", "masks/d.png", "images/.h.jpg")
    source = open_source(f"masks:{tmp_path}")
    assert [source.key(i) for i in range(len(source))] == ["b"]
    assert source.problems() == ["images without mask (left out): 2, as a", "masks without image (left out): 1, as d"]


def palette(values: np.ndarray) -> bytes:
    image = Image.frombytes("P", values.shape[::-1], values.tobytes())
    image.putpalette([7, 7, 7, 200, 0, 0, 0, 200, 0] + [1, 2, 3] * 253)
    return encoded(image)


def test_palette_files_hold_indices_and_sixteen_bits_are_read() -> None:
    coding = Coding.of(3, 255, False)
    np.testing.assert_array_equal(read_mask(palette(VALUES), coding, "k"), VALUES)
    for kind, form in ((np.uint16, "PNG"), (np.int32, "TIFF")):
        data = encoded(Image.fromarray(VALUES.astype(kind)), form)
        np.testing.assert_array_equal(read_mask(data, coding, "k"), VALUES)
    two = encoded(Image.fromarray(VALUES == 1))
    assert Image.open(io.BytesIO(two)).mode == "1"
    np.testing.assert_array_equal(read_mask(two, coding, "k"), (VALUES == 1).astype(np.uint8))


@pytest.mark.parametrize(
    ("classes", "ignored", "zero_is_ignored", "values", "read"),
    [
        (3, None, False, [0, 2, 255], [0, 2, 255]),
        (3, 11, False, [0, 2, 11], [0, 2, 255]),
        (3, None, True, [0, 1, 3, 255], [255, 0, 2, 255]),
        (3, 2, False, [0, 1, 2], [0, 1, 255]),  # what is to be ignored is no class
        (255, None, False, [0, 254, 255], [0, 254, 255]),
        (256, None, False, [0, 255, 65535], [0, 255, 65535]),
        (255, None, True, [0, 1, 255, 65535], [255, 0, 254, 255]),
        (847, 65535, False, [846, 300, 65535], [846, 300, 65535]),
    ],
)
def test_values_become_classes(
    classes: int, ignored: int | None, zero_is_ignored: bool, values: list[int], read: list[int]
) -> None:
    coding = Coding.of(classes, ignored, zero_is_ignored)
    mask = read_mask(encoded(Image.fromarray(np.array([values], dtype=np.uint16))), coding, "k")
    assert mask[0].tolist() == read
    assert mask.dtype == (np.uint8 if classes <= 255 else np.uint16)


def colours() -> bytes:
    return encoded(Image.new("RGB", SIZE, "red"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            mask_file(np.full((4, 6), 7, dtype=np.uint8)),
            "has the value 7 in m.png, which stands for no class .allowed: 0 to 2",
        ),
        (encoded(Image.fromarray(np.full((4, 6), 70000, dtype=np.int32)), "TIFF"), "has the value 70000 in m.png"),
        (colours(), r"has a mask of colours .RGB., not of class indices: m.png; save it as grey or palette png"),
        (encoded(Image.new("RGBA", SIZE)), "has a mask of colours .RGBA."),
        (encoded(Image.new("LA", SIZE)), "has a mask of colours .LA."),
        (mask_file()[:50], "has a mask that cannot be read: m.png"),
        (b"", "has a mask that cannot be read: m.png"),
    ],
)
def test_masks_that_are_none_are_bad_examples(data: bytes, message: str) -> None:
    with pytest.raises(BadExample, match=f"^k: {message}"):
        read_mask(data, Coding.of(3, 255, False), "k", "m.png")


def test_one_bad_mask_is_met_later_but_all_are_refused_at_once(tmp_path: Path) -> None:
    put(listed(tmp_path), *(f"{kind}" for i in range(3) for kind in (f"images/{i}.jpg", f"masks/{i}.png")))
    (tmp_path / "masks" / "0.png").write_bytes(mask_file(VALUES + 1))
    source = open_source(f"masks:{tmp_path}")
    with pytest.raises(BadExample, match=r"0: has the value 3 in masks/0\.png, which stands for no class"):
        source[0]
    assert source[1].mask is not None
    for i in range(3):
        (tmp_path / "masks" / f"{i}.png").write_bytes(colours())
    with pytest.raises(UserError, match=r"the masks of .* do not fit its 3 classes: 0 has a mask of colours"):
        open_source(f"masks:{tmp_path}")


def test_a_mask_of_another_size_is_a_bad_example(tmp_path: Path) -> None:
    put(listed(tmp_path), "images/a.jpg", "masks/a.png")
    (tmp_path / "images" / "a.jpg").write_bytes(png(0, (12, 8)))
    with pytest.raises(BadExample, match="a: is 12 x 8 px, but its mask is 6 x 4 px"):
        open_source(f"masks:{tmp_path}")[0]
    (tmp_path / "images" / "a.jpg").write_bytes(b"none")
    assert open_source(f"masks:{tmp_path}")[0].mask is not None  # decoding tells what is wrong with the image


def test_class_names_come_from_files_and_numbers(tmp_path: Path) -> None:
    place = put(tmp_path / "data", "images/a.jpg", "masks/a.png")
    with pytest.raises(UserError, match=r"has no class names; put .* into classes.json beside it, or give"):
        open_source(f"masks:{place}")
    (tmp_path / "names.txt").write_text("one\ntwo\n\nthree\n")
    assert open_source(f"masks:{place}?classes={tmp_path}/names.txt").mask_names == ["one", "two", "three"]
    assert open_source(f"masks:{place}?classes=4").mask_names == ["class 0", "class 1", "class 2", "class 3"]
    listed(tmp_path, '{"classes": ["x", "y"], "ignore_index": 2}')  # beside the folder
    with pytest.raises(UserError, match=r"do not fit its 2 classes: a has the value 255 .*allowed: 0 to 1, 2"):
        open_source(f"masks:{place}")


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?classes=0", "is to have 0 classes; give a number from 1 to 65535"),
        ("?classes=nowhere.txt", "the class list nowhere.txt is not there"),
        (
            "?masks=labels",
            "has no masks in a folder 'labels': saw classes.json, images, masks; name the folder with .masks=",
        ),
        ("?images=img", "has no images in a folder 'img'"),
        ("?zero_is=nothing", "masks.zero_is must be"),
        ("?ignore=-1", "masks.ignore must be at least 0"),
        ("?clases=3", "did you mean 'masks.classes'"),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path: Path, query: str, message: str) -> None:
    put(listed(tmp_path), "images/a.jpg", "masks/a.png")
    with pytest.raises(UserError, match=message):
        open_source(f"masks:{tmp_path}{query}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "holds no class names"),
        ("no json", "holds no class names"),
        ('{"classes": ["a"], "ignore_index": "b"}', "has the ignore_index 'b'; give a whole number"),
        ('{"classes": ["a", "b"], "readable_names": ["x"]}', "1 readable_names for 2 classes"),
    ],
)
def test_a_class_list_that_is_none_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    put(listed(tmp_path, text), "images/a.jpg", "masks/a.png")
    with pytest.raises(UserError, match=message):
        open_source(f"masks:{tmp_path}")


def test_nothing_in_common_is_told(tmp_path: Path) -> None:
    put(listed(tmp_path), "images/a.jpg", "masks/a_mask.png")
    with pytest.raises(UserError, match=r"no image of .* has a mask: saw a and a_mask; the names must be alike"):
        open_source(f"masks:{tmp_path}")
    with pytest.raises(UserError, match="nowhere is not there"):
        open_source(f"masks:{tmp_path}/nowhere")


def test_the_fingerprint_tells_other_masks_and_codings(tmp_path: Path) -> None:
    put(listed(tmp_path), "images/a.jpg", "masks/a.png")
    prints = [open_source(f"masks:{tmp_path}{query}").fingerprint() for query in ("", "?classes=4", "?zero_is=ignore")]
    (tmp_path / "masks" / "a.png").write_bytes(mask_file(VALUES[::-1] * 0))
    prints.append(open_source(f"masks:{tmp_path}").fingerprint())
    assert len(set(prints)) == 4


def test_nothing_grows_with_the_masks(tmp_path: Path) -> None:
    counts: list[Any] = []
    for count in (2, 100):
        folder = listed_folder(tmp_path / str(count))
        put(folder, *(name for i in range(count) for name in (f"images/{i}.jpg", f"masks/{i}.png")))
        counts.append(python_objects(open_source(f"masks:{folder}")))
    assert counts[0] == counts[1]


def listed_folder(folder: Path) -> Path:
    folder.mkdir()
    return listed(folder)


def test_the_real_set(shared: Path) -> None:
    names = json.loads((shared / "data/segmentation/camvid/classes.json").read_text())["classes"]
    for split, count in (("train", 367), ("val", 101)):
        source = open_source(f"masks:{shared}/data/segmentation/camvid/{split}.tar")
        assert len(source) == count
        assert source.mask_names == names
        assert source.problems() == []
        seen = np.zeros(256, dtype=np.int64)
        for i in range(0, count, 10):
            mask = source[i].mask
            assert mask is not None and mask.shape == (240, 320)
            seen += np.bincount(mask.ravel(), minlength=256)
        assert set(np.flatnonzero(seen)) == {*range(11), 255}
