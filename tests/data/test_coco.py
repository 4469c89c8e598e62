"""COCO's json files: things, captions, outlines, and what is wrong with them."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import encoded, picture, png, python_objects, write_tar
from PIL import Image, ImageDraw
from pycocotools import mask as pycoco_mask
from pycocotools.coco import COCO

from harmony.data.sources import BadExample, open_source
from harmony.errors import UserError

WIDTH, HEIGHT = 40, 32
SQUARE = [[4, 6, 20, 6, 20, 16, 4, 16]]
# A region of the 4 pixels (x 1, y 2 .. 5): columns of 32 pixels, from the top.
RUNS = {"size": [HEIGHT, WIDTH], "counts": [34, 4, WIDTH * HEIGHT - 38]}


def thing(number: int, image: int = 7, category: int = 3, box: Any = (4, 6, 16, 10), **more: Any) -> dict[str, Any]:
    made = {"id": number, "image_id": image, "category_id": category, "bbox": list(box), "iscrowd": 0, "area": 160}
    return made | more


def instances(*things: dict[str, Any]) -> dict[str, Any]:
    return {
        "images": [
            {"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT}
            for number, name in ((9, "b.png"), (7, "a.png"))
        ],
        "annotations": list(things),
        "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}],
    }


def captions(*pairs: tuple[int, str]) -> dict[str, Any]:
    made = instances()
    del made["categories"]
    made["annotations"] = [{"id": k, "image_id": image, "caption": text} for k, (image, text) in enumerate(pairs)]
    return made


def write(folder: Path, content: Any, name: str = "i.json", images: bool = True) -> str:
    (folder / name).write_text(json.dumps(content))
    if images:
        for number, file in enumerate(("a.png", "b.png")):
            (folder / file).write_bytes(png(number, (WIDTH, HEIGHT)))
    return f"coco:{folder / name}"


def test_things_stand_by_their_image_in_the_order_of_the_file(tmp_path: Path) -> None:
    content = instances(
        thing(1, 7, 18, (1.5, 2, 3, 4)), thing(2, 9, 3, (0, 0, 40, 32), iscrowd=1, area=7.5), thing(3, 7, 3, area=0)
    )
    source = open_source(write(tmp_path, content))
    assert [source.key(i) for i in range(2)] == ["b.png", "a.png"]
    assert source.object_names == ["car", "dog"]  # by category id
    first, second = (source[i].objects for i in range(2))
    assert first is not None and second is not None
    assert (first.image_id, second.image_id) == (9, 7)
    assert first.boxes.tolist() == [[0, 0, 40, 32]]
    assert second.boxes.tolist() == [[1.5, 2, 4.5, 6], [4, 6, 20, 16]]
    assert second.labels.tolist() == [1, 0]
    assert (first.crowd.tolist(), second.crowd.tolist()) == ([True], [False, False])
    assert (first.areas.tolist(), second.areas.tolist()) == ([7.5], [160, 160])  # the box's where the file has none
    assert second.boxes.dtype == second.areas.dtype == np.float32
    assert (second.labels.dtype, second.crowd.dtype) == (np.int64, np.bool_)
    assert second.masks is None
    assert not source.has_object_masks
    assert source[1].image == png(0, (WIDTH, HEIGHT))
    assert source.problems() == []
    with pytest.raises(IndexError):
        source[2]


def test_images_without_things_are_kept(tmp_path: Path) -> None:
    source = open_source(write(tmp_path, instances(thing(1, 7, segmentation=SQUARE))))
    empty = source[0].objects
    assert empty is not None and empty.masks is not None
    assert empty.boxes.shape == (0, 4)
    assert empty.masks().shape == (0, HEIGHT, WIDTH)


@pytest.mark.parametrize("compressed", [False, True])
def test_masks_are_those_of_pycocotools_and_of_a_hand(tmp_path: Path, compressed: bool) -> None:
    runs: dict[str, Any] = dict(RUNS)
    if compressed:
        runs["counts"] = pycoco_mask.frPyObjects(RUNS, HEIGHT, WIDTH)["counts"].decode()
    two = [[1, 1, 17, 1, 17, 20], [22.5, 10, 38, 11.25, 25, 30]]
    content = instances(
        thing(1, segmentation=SQUARE), thing(2, segmentation=runs, iscrowd=1), thing(3, segmentation=two)
    )
    source = open_source(write(tmp_path, content))
    objects = source[1].objects
    assert source.has_object_masks and objects is not None and objects.masks is not None
    masks = objects.masks()
    assert masks.shape == (3, HEIGHT, WIDTH) and masks.dtype == np.bool_
    square = np.zeros((HEIGHT, WIDTH), dtype=bool)
    square[6:16, 4:20] = True
    np.testing.assert_array_equal(masks[0], square)
    assert np.argwhere(masks[1]).tolist() == [[2, 1], [3, 1], [4, 1], [5, 1]]
    coco = COCO(str(tmp_path / "i.json"))
    for mask, number in zip(masks, (1, 2, 3), strict=True):
        np.testing.assert_array_equal(mask, coco.annToMask(coco.anns[number]).astype(bool))
    # Pillow paints the same but for the outline, whose pixels are a matter of taste.
    painted, outline = Image.new("1", (WIDTH, HEIGHT)), Image.new("1", (WIDTH, HEIGHT))
    for polygon in two:
        ImageDraw.Draw(painted).polygon(polygon, fill=1)
        ImageDraw.Draw(outline).line(polygon + polygon[:2], fill=1, width=3)
    assert not ((np.asarray(painted) != masks[2]) & ~np.asarray(outline)).any()
    assert (np.asarray(painted) & ~np.asarray(outline)).sum() > 20
    assert pickle.loads(pickle.dumps(objects)).masks().sum() == masks.sum()


def test_captions_alone_and_beside_things(tmp_path: Path) -> None:
    uri = write(tmp_path, captions((7, "a  dog\n"), (9, "two"), (7, "a pet"), (9, " "), (5, "nobody's")), "c.json")
    alone = open_source(uri)
    assert [alone[i].captions for i in range(2)] == [["two"], ["a dog", "a pet"]]
    assert alone[0].objects is None and alone.object_names is None
    alone.require_captions()
    noted = [
        "captions without a word (left out): 1, as annotation 3",
        "captions of images that are not listed (left out): 1, as annotation 4",
    ]
    assert alone.problems() == noted
    both = open_source(write(tmp_path, instances(thing(1))) + "?captions=c.json")  # beside the file
    assert both[1].captions == ["a dog", "a pet"]
    objects = both[1].objects
    assert objects is not None and len(objects.labels) == 1
    assert both.problems() == noted
    with pytest.raises(UserError, match="names two files of captions"):
        open_source(f"{uri}?captions=c.json")
    with pytest.raises(UserError, match="holds no captions"):
        open_source(f"coco:{tmp_path}/i.json?captions=i.json")
    with pytest.raises(UserError, match="saw only images; use data with captions"):
        open_source(f"coco:{tmp_path}/i.json").require_captions()


def test_captions_of_other_images_are_refused(tmp_path: Path) -> None:
    other = captions((7, "a dog"))
    other["images"][1]["file_name"] = "z.png"
    write(tmp_path, other, "c.json")
    with pytest.raises(UserError, match=r"image 7 is a\.png in i\.json and z\.png in c\.json"):
        open_source(write(tmp_path, instances()) + "?captions=c.json")


@pytest.mark.parametrize("form", ["folder", "sub-folder", "tar", "two tars"])
def test_images_lie_in_folders_and_tars(tmp_path: Path, form: str) -> None:
    members = [("val/a.png", png(0, (WIDTH, HEIGHT))), ("val/B.PNG", png(1, (WIDTH, HEIGHT)))]
    content = instances(thing(1))
    content["images"][0]["file_name"] = "B.png"
    place = tmp_path / "images"
    place.mkdir()
    if form == "tar":
        place = write_tar(tmp_path / "images.tar", [(name.removeprefix("val/"), data) for name, data in members])
    elif form == "two tars":
        for number, member in enumerate(members):
            write_tar(place / f"{number}.tar", [member])
        place = place / "{0..1}.tar"
    else:
        folder = place if form == "folder" else place / "val"
        folder.mkdir(exist_ok=True)
        for name, data in members:
            (folder / name.removeprefix("val/")).write_bytes(data)
    source = open_source(write(tmp_path, content, images=False) + f"?images={place}")
    assert [source[i].image for i in range(2)] == [png(1, (WIDTH, HEIGHT)), png(0, (WIDTH, HEIGHT))]
    assert source.problems() == []


NO_BOX = "boxes that are not four numbers (left out): 1, as annotation 5"
NO_AREA = "boxes without area (left out): 1, as annotation 5"
NO_OUTLINE = "outlines that are no polygon and no run lengths of their image (the box serves): 1, as annotation 5"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"bbox": [4, 6, 0, 10]}, NO_AREA),
        ({"bbox": [4, 6, 16, -1]}, NO_AREA),
        ({"bbox": []}, NO_BOX),
        ({"bbox": [1, 2, "3", 4]}, NO_BOX),
        ({"bbox": [1, 2, float("nan"), 4]}, NO_BOX),
        ({"bbox": None}, NO_BOX),
        ({"bbox": [50, 6, 5, 5]}, "boxes outside the image (left out): 1, as annotation 5"),
        ({"image_id": 1}, "annotations of images that are not listed (left out): 1, as annotation 5"),
        ({"image_id": [7]}, "annotations of images that are not listed (left out): 1, as annotation 5"),
        ({"category_id": 4}, "annotations of categories that are not listed (left out): 1, as annotation 5"),
        ({"category_id": None}, "annotations of categories that are not listed (left out): 1, as annotation 5"),
    ],
)
def test_things_that_cannot_be_used_are_left_out_and_counted(tmp_path: Path, change: dict, problem: str) -> None:
    source = open_source(write(tmp_path, instances(thing(4), thing(5) | change, thing(6))))
    objects = source[1].objects
    assert objects is not None and len(objects.labels) == 2
    assert source.problems() == [problem]


def test_boxes_are_clipped_to_the_image(tmp_path: Path) -> None:
    content = instances(thing(1, box=(-5, 2, 10, 4)), thing(2, box=(30, 30, 10.5, 2.5)))
    source = open_source(write(tmp_path, content))
    objects = source[1].objects
    assert objects is not None and objects.boxes.tolist() == [[0, 2, 5, 6], [30, 30, 40, 32]]
    # Rounding alone is not worth a word.
    assert source.problems() == ["boxes that reach beyond the image (clipped): 1, as annotation 1"]


@pytest.mark.parametrize(
    "outline",
    [
        [[1, 2, 3, 4]],
        [[1, 1, 5, 1, 5, 5, 1]],
        [[1, 1, 5, 1, float("nan"), 5]],
        [[1, 1, 5, 1, 1e12, 5]],
        [[1, 1, 5, 1, "5", 5]],
        "polygon",
        {"size": [WIDTH, HEIGHT], "counts": [34, 4, WIDTH * HEIGHT - 38]},
        {"size": [HEIGHT, WIDTH], "counts": [34, 4]},
        {"size": [HEIGHT, WIDTH], "counts": [34, -4, WIDTH * HEIGHT - 30]},
        {"size": [HEIGHT, WIDTH], "counts": []},
        {"size": [HEIGHT, WIDTH], "counts": ["a"]},
        {"size": [HEIGHT, WIDTH], "counts": "zz\x7fhello"},
        {"size": [HEIGHT, WIDTH], "counts": "34"},
        {"size": [HEIGHT, WIDTH], "counts": "\u00e9"},
        {"counts": [1]},
    ],
)
def test_outlines_that_are_none_give_way_to_the_box(tmp_path: Path, outline: Any) -> None:
    content = instances(thing(4, segmentation=SQUARE), thing(5, box=(1.5, 2, 2.2, 3), segmentation=outline))
    source = open_source(write(tmp_path, content))
    assert source.problems() == [NO_OUTLINE]
    objects = source[1].objects
    assert objects is not None and objects.masks is not None
    box = np.zeros((HEIGHT, WIDTH), dtype=bool)
    box[2:5, 1:4] = True
    np.testing.assert_array_equal(objects.masks()[1], box)


def test_some_without_outline_are_counted_and_all_without_have_no_masks(tmp_path: Path) -> None:
    content = instances(thing(4, segmentation=SQUARE), thing(5, segmentation=[]), thing(6))
    source = open_source(write(tmp_path, content))
    assert source.problems() == ["things without an outline among others with one (the box serves): 2, as annotation 5"]
    assert source.has_object_masks
    source = open_source(write(tmp_path, instances(thing(5, segmentation=[]), thing(6))))
    assert not source.has_object_masks and source.problems() == []


def test_what_stands_twice_counts_once_and_shared_ids_are_told(tmp_path: Path) -> None:
    content = instances(thing(4), thing(4), thing(4, box=(0, 0, 9, 9)))
    content["images"].append(dict(content["images"][0]))
    source = open_source(write(tmp_path, content))
    assert len(source) == 2
    objects = source[1].objects
    assert objects is not None and len(objects.labels) == 2
    assert source.problems() == [
        "images that are listed twice (used once): 1, as b.png",
        "things that are written twice (used once): 1, as annotation 4",
        "annotation ids that several things share (all are used): 1, as annotation 4",
    ]


def test_absent_images_are_left_out_with_their_things(tmp_path: Path) -> None:
    uri = write(tmp_path, instances(thing(1, 9), thing(2, 7)))
    (tmp_path / "b.png").unlink()
    source = open_source(uri)
    objects = source[0].objects
    assert len(source) == 1 and objects is not None and len(objects.labels) == 1
    assert source.problems() == ["images that are not there (left out): 1, as b.png"]
    (tmp_path / "a.png").unlink()
    with pytest.raises(
        UserError, match=r"none of the 2 images of .* looked for b.png; say where they are with .images="
    ):
        open_source(uri)


def test_an_image_of_another_size_is_a_bad_example(tmp_path: Path) -> None:
    source = open_source(write(tmp_path, instances(thing(1), thing(2, 9))))
    (tmp_path / "a.png").write_bytes(png(0, (20, 16)))
    with pytest.raises(BadExample, match=r"a.png: is 20 x 16 px, but its annotations are for 40 x 32 px"):
        source[1]
    (tmp_path / "a.png").write_bytes(b"no image")
    assert source[1].objects is not None  # decoding tells what is wrong with it
    (tmp_path / "b.png").unlink()
    with pytest.raises(BadExample, match=r"b.png: b.png cannot be read: No such file"):
        source[0]


def test_the_size_is_that_of_the_image_upright(tmp_path: Path) -> None:
    uri = write(tmp_path, instances(thing(1)))
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.png").write_bytes(encoded(picture(0, (HEIGHT, WIDTH)), exif=exif))
    assert open_source(uri)[1].objects is not None
    (tmp_path / "a.png").write_bytes(encoded(picture(0, (WIDTH, HEIGHT)), exif=exif))
    with pytest.raises(BadExample, match="is 32 x 40 px"):
        open_source(uri)[1]


def test_sizes_that_the_file_lacks_are_the_images_own(tmp_path: Path) -> None:
    content = instances(thing(1, box=(30, 2, 20, 4), segmentation=SQUARE))
    for image in content["images"]:
        del image["width"], image["height"]
    source = open_source(write(tmp_path, content))
    objects = source[1].objects
    assert objects is not None and objects.masks is not None
    assert objects.boxes.tolist() == [[30, 2, 40, 6]]
    assert objects.masks().shape == (1, HEIGHT, WIDTH) and objects.masks().sum() == 160


def changed(**parts: Any) -> dict[str, Any]:
    return instances(thing(1)) | parts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "is no COCO file: it holds a list"),
        ({"info": 1, "annotations": []}, "no list 'images', saw info, annotations"),
        ({"images": []}, "no list 'annotations', saw images"),
        (changed(images=[1]), "its images are not objects"),
        (changed(images=[]), "lists no images"),
        (changed(images=[{"id": "a", "file_name": "x"}]), "image 0 has the id 'a'; COCO ids are whole numbers"),
        (changed(images=[{"id": 1}]), "the image with the id 1 has no file_name"),
        (changed(images=[{"id": 7, "file_name": name} for name in "xy"]), "two images with the id 7, x and y"),
        (changed(categories=[]), "has no list 'categories'"),
        (
            changed(categories=[{"id": 3, "name": "car"}, {"id": 3, "name": "cat"}]),
            "two categories with the id 3, car and",
        ),
        (changed(categories=["car"]), "a category with the id None"),
        (changed(annotations=[{"segments_info": []}]), "holds panoptic segments"),
    ],
)
def test_what_is_no_coco_file_is_one_sentence(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(write(tmp_path, content))


def test_other_files_and_settings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    uri = write(tmp_path, instances())
    for wrong, message in (
        (f"coco:{tmp_path}/x.json", "is no json"),
        (f"coco:{tmp_path}/no.json", "no.json is not there"),
        (f"{uri}?images=nowhere", "nowhere is not there"),
        (f"{uri}?image=x", "did you mean 'coco.images'"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(wrong)


def test_the_fingerprint_tells_other_images_and_other_things(tmp_path: Path) -> None:
    content = instances(thing(1))
    uri = write(tmp_path, content)
    prints = {open_source(uri).fingerprint()}
    write(tmp_path, instances(thing(1), thing(2)), images=False)
    prints.add(open_source(uri).fingerprint())
    (tmp_path / "a.png").write_bytes(png(5, (WIDTH, HEIGHT)) + b" ")
    prints.add(open_source(uri).fingerprint())
    assert len(prints) == 3


def test_nothing_grows_with_the_things(tmp_path: Path) -> None:
    counts = []
    for count in (3, 300):
        content = instances(*(thing(number, segmentation=copy.deepcopy(SQUARE)) for number in range(count)))
        source = open_source(write(tmp_path, content))
        counts.append(python_objects(source))
    assert counts[0] == counts[1]


def test_the_real_sets(shared: Path) -> None:
    folder = shared / "data" / "detection"
    for name, split, images, things, crowds, classes in (
        ("coco_mini", "train", 145, 1524, 17, 76),
        ("coco_mini", "val", 50, 394, 5, 64),
        ("bccd", "train", 205, 2804, 0, 3),
        ("bccd", "val", 87, 1137, 0, 3),
    ):
        file = folder / name / "annotations" / f"instances_{split}.json"
        source = open_source(f"coco:{file}?images={folder / name}/images_{split}.tar")
        objects = [source[i].objects for i in range(len(source))]
        labels = np.concatenate([one.labels for one in objects if one is not None])
        assert (len(source), len(labels), len(set(labels.tolist()))) == (images, things, classes)
        assert sum(int(one.crowd.sum()) for one in objects if one is not None) == crowds
        assert source.has_object_masks == (name == "coco_mini")
        assert source.problems() == []


def test_the_real_masks_are_those_of_pycocotools(shared: Path) -> None:
    folder = shared / "data" / "detection" / "coco_mini"
    file = folder / "annotations" / "instances_val.json"
    source = open_source(f"coco:{file}?images={folder}/images_val.tar&captions=captions_val.json")
    coco = COCO(str(file))
    for i in range(0, len(source), 5):
        objects = source[i].objects
        assert objects is not None and objects.masks is not None
        theirs = coco.loadAnns(coco.getAnnIds(imgIds=objects.image_id))
        assert [source.object_names[label] for label in objects.labels] == [  # type: ignore[index]
            coco.cats[one["category_id"]]["name"] for one in theirs
        ]
        for mask, one in zip(objects.masks(), theirs, strict=True):
            np.testing.assert_array_equal(mask, coco.annToMask(one).astype(bool))
    assert sum(len(source[i].captions) for i in range(len(source))) == 250
