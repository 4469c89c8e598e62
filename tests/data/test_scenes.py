"""Generated scenes: the same every time, split by combination, and described as they are painted."""

import hashlib
import json
import math
import pickle
import re
import tarfile
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from harmony.data.captions import Tokenizer
from harmony.data.scenes.captions import captions
from harmony.data.scenes.generate import generate
from harmony.data.scenes.layout import COMBINATIONS, CONTRAST, HELD_OUT, SEEN, SplitName, is_held_out, scene
from harmony.data.scenes.paint import Picture, paint
from harmony.data.scenes.shapes import OUTLINES
from harmony.data.scenes.words import CLASSES, COLOURS, GROUNDS, SHAPES, TEXTURES, TONES
from harmony.data.sources import open_source
from harmony.data.sources.scenes import VERSION
from harmony.errors import UserError

places = st.integers(0, 100_000)
splits = st.sampled_from(["train", "val", "held_out"])


def pixels(uri: str, i: int) -> np.ndarray:
    image = open_source(uri)[i].image
    assert isinstance(image, Image.Image)
    return np.asarray(image)


# The same every time


@given(splits, st.integers(0, 500), st.integers(0, 5))
def test_a_scene_is_a_function_of_seed_split_and_index(split: SplitName, i: int, seed: int) -> None:
    short, long = f"scenes:{split}?count={i + 1}&seed={seed}", f"scenes:{split}?count=9999&seed={seed}"
    one, other = open_source(short)[i], pickle.loads(pickle.dumps(open_source(long)))[i]
    assert np.array_equal(pixels(short, i), pixels(long, i))
    assert (one.captions, one.label, one.key) == (other.captions, other.label, other.key)
    large = open_source(f"{long}&size=96")[i]  # the same scene in more detail
    assert (large.captions, large.label) == (one.captions, one.label)
    assert one.objects and large.objects
    boxes, larger = one.objects.boxes / 64, large.objects.boxes / 96
    assert np.abs(boxes - larger).max() < 2.5 / 64


def test_seeds_splits_and_indices_give_other_scenes() -> None:
    uris = ["scenes:", "scenes:?seed=1", "scenes:val", "scenes:held_out"]
    seen = {(uri, i): pixels(uri, i).tobytes() for uri in uris for i in range(8)}
    assert len(set(seen.values())) == len(seen)


def test_a_change_of_the_scenes_needs_a_new_version() -> None:
    """What the scenes say, pinned for this version: raise VERSION with it, or runs go on with other data."""
    said = "\n".join(
        text for split in ("train", "val", "held_out") for i in range(40) for text in captions(scene(0, split, i))
    )
    assert (VERSION, hashlib.sha256(said.encode()).hexdigest()[:16]) == (2, "937af2629eba6a48")


def test_the_fingerprint_tells_sources_apart() -> None:
    uris = ["scenes:", "scenes:val", "scenes:?count=5", "scenes:?size=32", "scenes:?seed=1"]
    assert len({open_source(uri).fingerprint() for uri in uris}) == len(uris)
    assert open_source("scenes:").fingerprint() == open_source("scenes:train?size=64").fingerprint()


# The splits


def test_what_is_held_out_leaves_every_pair_in_training() -> None:
    assert len(HELD_OUT) * 5 == len(COMBINATIONS)
    assert not set(HELD_OUT) & set(SEEN)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert {(c[one], c[other]) for c in SEEN} == {(c[one], c[other]) for c in COMBINATIONS}
    assert {c[2] for c in HELD_OUT} == set(range(len(TEXTURES)))
    # Each class is met in both, so its name can be learnt in training and tested on held-out scenes.
    assert {c[:2] for c in HELD_OUT} == {c[:2] for c in COMBINATIONS}


@pytest.mark.parametrize("seed", [0, 7])
def test_no_held_out_combination_occurs_in_train(seed: int) -> None:
    for split in ("train", "val"):
        things = [thing for i in range(2000) for thing in scene(seed, split, i).things]
        assert not any(is_held_out((thing.shape, thing.colour, thing.texture)) for thing in things)
    mains = [scene(seed, "held_out", i).things[0] for i in range(300)]
    assert all(is_held_out((main.shape, main.colour, main.texture)) for main in mains)


@settings(max_examples=12)
@given(splits, st.integers(0, 20), st.integers(0, 99))
def test_classes_are_equally_frequent(split: SplitName, turn: int, seed: int) -> None:
    count = len(HELD_OUT) if split == "held_out" else len(SEEN)
    labels = Counter(scene(seed, split, turn * count + k).things[0].label for k in range(count))
    assert labels == dict.fromkeys(range(len(CLASSES)), count // len(CLASSES))


# What is painted


@given(splits, places)
def test_things_lie_apart_and_inside(split: SplitName, i: int) -> None:
    drawn = scene(0, split, i)
    picture = paint(drawn, 64)
    check_boxes(picture)
    for thing, (left, top, width, height) in zip(drawn.things, picture.boxes, strict=True):
        assert left >= 0
        assert top >= 0
        assert left + width <= 64
        assert top + height <= 64
        # A shape is as large as its radius says, and lies where it should.
        assert 1.2 * thing.radius * 64 < max(width, height) < 2.4 * thing.radius * 64
        assert abs(left + width / 2 - thing.x * 64) < 0.4 * thing.radius * 64
        assert abs(top + height / 2 - thing.y * 64) < 0.4 * thing.radius * 64
        assert thing.radius <= drawn.things[0].radius


def test_the_smallest_pictures_still_show_every_thing() -> None:
    for i in range(300):
        picture = paint(scene(0, "train", i), 16)
        assert all((picture.mask == label + 1).sum() >= 3 for label in picture.labels)


def check_boxes(picture: Picture) -> None:
    """No thing hides another, the mask holds just their classes, and each box is the tight one."""
    assert set(np.unique(picture.mask)) == {0} | {int(label) + 1 for label in picture.labels}
    covered = np.zeros_like(picture.mask, dtype=int)
    for left, top, width, height in picture.boxes.astype(int):
        covered[top : top + height, left : left + width] += 1
    for label, (left, top, width, height) in zip(picture.labels, picture.boxes.astype(int), strict=True):
        inside = picture.mask[top : top + height, left : left + width] == label + 1
        assert inside[0].any()
        assert inside[-1].any()
        assert inside[:, 0].any()
        assert inside[:, -1].any()
    assert (covered[picture.mask > 0] > 0).all()


@given(places)
def test_the_painted_colours_are_those_of_the_labels(i: int) -> None:
    drawn = scene(0, "train", i)
    picture = paint(drawn, 64)
    names = list(COLOURS)
    for thing in drawn.things:
        if TEXTURES[thing.texture] == "solid" and sum(other.label == thing.label for other in drawn.things) == 1:
            mean = picture.pixels[picture.mask == thing.label + 1].mean(0)
            nearest = min(names, key=lambda name: np.abs(mean - COLOURS[name][0]).sum())
            assert nearest == names[thing.colour]
    ground = picture.pixels[picture.mask == 0]
    assert np.abs(np.median(ground, 0) - TONES[drawn.ground.tone]).mean() < 70


def test_some_ground_stands_off_from_any_three_colours() -> None:
    for colours in combinations(COLOURS.values(), 3):
        for kind, (_, tones) in GROUNDS.items():
            far = [tone for tone in tones if all(math.dist(TONES[tone], base) > CONTRAST for base, _ in colours)]
            assert far, (kind, colours)


def test_edges_are_as_smooth_as_a_picture_four_times_as_large_averaged_down() -> None:
    compared = 0
    for i in range(60):
        drawn = scene(3, "train", i)
        # Noise and joints of the other grounds, and fine textures, are painted at the size of the pixels.
        if drawn.ground.kind in ("plain", "gradient") and TEXTURES[drawn.things[0].texture] == "solid":
            small, large = paint(drawn, 64), paint(drawn, 256)
            difference = np.abs(large.pixels.reshape(64, 4, 64, 4, 3).mean((1, 3)) - small.pixels)
            inside = small.mask == small.labels[0] + 1
            edge = np.zeros_like(inside)
            edge[1:] |= inside[1:] != inside[:-1]
            edge[:, 1:] |= inside[:, 1:] != inside[:, :-1]
            assert difference[edge].mean() < 3  # of 255; an edge a pixel sharper or softer gives 8
            compared += 1
    assert compared >= 5


def test_shapes_are_told_apart_and_fit() -> None:
    axis = np.linspace(-1.5, 1.5, 121, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    inside = {name: outline(x, y) <= 0 for name, outline in OUTLINES.items()}
    assert set(inside) == set(SHAPES)
    for name, covered in inside.items():
        assert np.hypot(x, y)[covered].max() <= 1.2
        assert 1.5 < covered.mean() * 9 < 3  # its area, for a radius of 1
        for other in SHAPES[: SHAPES.index(name)]:
            both = (covered & inside[other]).sum() / (covered | inside[other]).sum()
            assert both < 0.9, (name, other)


@pytest.mark.parametrize("name", ["triangle", "star", "circle", "square", "ring", "moon"])
def test_outlines_are_distances(name: str) -> None:
    """Outside a shape, the value is the distance to the nearest point of it (found by search)."""
    axis = np.linspace(-1.5, 1.5, 301, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    inside = OUTLINES[name](x, y) <= 0
    points = np.stack([x[inside], y[inside]], 1)
    far = np.stack([x[~inside], y[~inside]], 1)[::701]
    nearest = np.sqrt(((far[:, None] - points[None]) ** 2).sum(-1)).min(1)
    assert np.abs(OUTLINES[name](far[:, 0], far[:, 1]) - nearest).max() < 0.015


# What is said

THING = rf"(?:an?|one) (large|small|big|little) ({'|'.join(TEXTURES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
SIDE = r"((?:to the )?(?:left|right) of|above|over|below|under)"


@given(splits, places)
def test_the_first_caption_says_what_is_there(split: SplitName, i: int) -> None:
    drawn = scene(0, split, i)
    picture = paint(drawn, 64)
    said = captions(drawn)[0]
    found = re.fullmatch(rf"{THING}(?: {SIDE} {THING})?(?: and {SIDE} {THING})? on (.+)", said)
    assert found is not None, said
    size, texture, colour, shape = found.groups()[:4]
    assert (size, f"{colour} {shape}") == ("large", CLASSES[picture.labels[0]])
    assert texture == TEXTURES[drawn.things[0].texture]
    x, y = picture.boxes[:, 0] + picture.boxes[:, 2] / 2, picture.boxes[:, 1] + picture.boxes[:, 3] / 2
    for k, start in enumerate((4, 9), 1):
        side, size, texture, colour, shape = found.groups()[start : start + 5]
        assert (side is not None) == (k < len(drawn.things))
        if side is not None:
            assert (size, f"{colour} {shape}") == ("small", CLASSES[picture.labels[k]])
            assert texture == TEXTURES[drawn.things[k].texture]
            # The centres of the boxes are near those of the things, and things are further apart than that.
            if "left" in side or "right" in side:
                assert x[0] < x[k] if "left" in side else x[0] > x[k]
            else:
                assert y[0] < y[k] if side in ("above", "over") else y[0] > y[k]
    ground = GROUNDS[drawn.ground.kind][0].format(drawn.ground.tone)
    assert re.fullmatch(f"(an? )?{ground}", found.groups()[-1])


@given(splits, places)
def test_every_caption_names_the_class_and_reads_well(split: SplitName, i: int) -> None:
    drawn = scene(0, split, i)
    said = captions(drawn)
    assert len(said) == len(set(said)) == 5
    for text in said:
        assert CLASSES[drawn.things[0].label] in text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  | ,|\{", text), text
    for text in said[:3]:
        for thing in drawn.things:
            assert CLASSES[thing.label] in text
    for text in said[:2]:
        assert drawn.ground.tone in text


def test_relations_hold_from_both_sides() -> None:
    """The second caption says the relation the other way round; the fourth says it of the thing that it names first."""
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    plain = {"over": "above", "under": "below"}
    checked, turned = 0, 0
    for i in range(200):
        drawn = scene(0, "train", i)
        if len(drawn.things) == 2 and drawn.things[0].label != drawn.things[1].label:
            said = captions(drawn)
            found = [re.findall(r"left|right|above|below|over|under", said[place]) for place in (0, 1, 3)]
            first, second, short = (plain.get(some[0], some[0]) for some in found)
            assert second == opposite[first]
            main, other = (said[3].index(CLASSES[thing.label]) for thing in drawn.things)
            assert short == (first if main < other else opposite[first])
            checked, turned = checked + 1, turned + (main > other)
    assert checked > 50
    assert 0 < turned < checked


def test_captions_are_short_enough_for_a_context_of_40() -> None:
    tokens = Tokenizer(77).encode([text for i in range(150) for text in captions(scene(0, "train", i))])
    assert tokens.shape[1] <= 40


def test_a_caption_tells_its_scene_from_others() -> None:
    said = Counter(captions(scene(0, "held_out", i))[0] for i in range(1024))
    assert sum(times == 1 for times in said.values()) > 0.95 * 1024


# Settings


def test_the_source_names_what_it_has() -> None:
    source = open_source("scenes:")
    assert (len(source), len(open_source("scenes:val")), source.class_names) == (8192, 1024, list(CLASSES))
    assert source.has_captions()
    assert source.has_labels()
    assert open_source("scenes:?split=held_out&count=3").key(2) == "held_out-00000002"
    for wrong in (-1, 8192):
        with pytest.raises(IndexError):
            source[wrong]


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("scenes:trian", "did you mean 'train'"),
        ("scenes:?sise=64", "did you mean 'scenes.size'"),
        ("scenes:?size=8", "at least 16"),
        ("scenes:?count=0", "at least 1"),
        ("scenes:?count=many", "whole number"),
        ("scenes:?seed=-1", "at least 0"),
        ("scenes:val?split=train", "twice"),
    ],
)
def test_a_wrong_uri_is_explained(uri: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        open_source(uri)


# Written to files


def test_generated_shards_hold_the_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harmony.data.scenes.generate.SHARD", 5)
    uri = "scenes:held_out?count=12&size=48"
    shards = generate(uri, tmp_path / "a")
    assert [shard.name for shard in shards] == [f"held_out-{k:05d}.tar" for k in range(3)]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "classes.json",
        *(shard.name for shard in shards),
    ]
    again = generate(uri, tmp_path / "b")
    assert [one.read_bytes() for one in shards] == [other.read_bytes() for other in again]
    written, source = open_source(f"shards:{tmp_path}/a/held_out-{{00000..00002}}.tar"), open_source(uri)
    assert len(written) == 12
    assert written.class_names == source.class_names
    for i in range(12):
        assert (written[i].key, written[i].captions, written[i].label) == (
            source[i].key,
            source[i].captions,
            source[i].label,
        )


def test_generated_json_describes_the_picture(tmp_path: Path) -> None:
    (shard,) = generate("scenes:train?count=2&size=48", tmp_path)
    example = open_source("scenes:train?size=48")[1]
    with tarfile.open(shard) as tar:
        assert tar.getnames()[4:] == [f"{example.key}.{ending}" for ending in ("jpg", "txt", "cls", "json")]
        described = json.load(tar.extractfile(f"{example.key}.json"))  # type: ignore[arg-type]
        image = np.asarray(Image.open(tar.extractfile(f"{example.key}.jpg")))  # type: ignore[arg-type]
        assert tar.extractfile(f"{example.key}.txt").read().decode() == example.captions[0]  # type: ignore[union-attr]
    assert described["captions"] == example.captions
    assert (described["label"], described["class"]) == (example.label, CLASSES[example.label or 0])
    assert example.objects
    assert np.array_equal(np.array(described["boxes"]), example.objects.boxes)
    assert np.abs(image.astype(int) - np.asarray(example.image)).mean() < 6


def test_generate_says_that_the_disk_is_full_and_leaves_no_part(tmp_path: Path) -> None:
    (tmp_path / "train-00000.part").symlink_to("/dev/full")  # whatever is written there fails for want of room
    with pytest.raises(UserError, match=f"no room on the disk at {tmp_path}; free some and run again"):
        generate("scenes:train?count=3&size=48", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_generate_refuses_other_data_and_used_folders(tmp_path: Path) -> None:
    (tmp_path / "x.tar").touch()
    with pytest.raises(UserError, match="shards already"):
        generate("scenes:?count=2", tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").touch()
    with pytest.raises(UserError):
        generate(f"folder:{tmp_path}/pictures", tmp_path / "out")
    assert not (tmp_path / "out").exists()
