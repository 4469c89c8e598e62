"""Crops: where they lie, against torchvision's RandomResizedCrop, and their pixels, against its functions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from harmony.chance import Chance
from harmony.data.cutting import Cutter, cut
from harmony.data.photometric import PRESETS, PhotometricConfig
from harmony.data.views import ViewConfig, draw_boxes, draw_flips, evaluation_crop, relative_boxes

sides = st.integers(1, 300)
seeds = st.integers(0, 2**31)


def streams(count: int, seed: int = 0) -> Chance:
    return Chance.of_examples(seed, 0, torch.arange(count))


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """A decoded image: (3, H, W) over memory in the order (H, W, 3)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1)


@st.composite
def views(draw: st.DrawFn) -> ViewConfig:
    scale = sorted(draw(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1))))
    ratio = sorted(draw(st.tuples(st.floats(0.2, 5), st.floats(0.2, 5))))
    return ViewConfig(size=8, count=draw(st.integers(1, 3)), scale=tuple(scale), ratio=tuple(ratio))


# Boxes


@given(views(), st.lists(st.tuples(sides, sides), min_size=1, max_size=5), seeds)
def test_boxes_lie_in_their_images(view: ViewConfig, sizes: list[tuple[int, int]], seed: int) -> None:
    boxes = draw_boxes(streams(len(sizes), seed), "global", view, torch.tensor(sizes))
    height, width = torch.tensor(sizes).unbind(1)
    left, top, wide, high = boxes.unbind(-1)
    assert boxes.shape == (view.count, len(sizes), 4)
    assert (wide >= 1).all()
    assert (high >= 1).all()
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + wide <= width).all()
    assert (top + high <= height).all()
    shares = relative_boxes(boxes, torch.tensor(sizes))
    assert shares.min() >= 0
    assert (shares[..., :2] + shares[..., 2:]).max() <= 1 + 1e-6


def plain_box(view: ViewConfig, numbers: list[list[float]], place: list[float], height: int, width: int) -> list[int]:
    """RandomResizedCrop for one image, with given uniform numbers: ten tries, then the central crop."""
    for first, second in numbers:
        area = height * width * (view.scale[0] + first * (view.scale[1] - view.scale[0]))
        low, high = math.log(view.ratio[0]), math.log(view.ratio[1])
        aspect = math.exp(low + second * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return [int(place[0] * (width - w + 1)), int(place[1] * (height - h + 1)), w, h]
    if width / height < min(view.ratio):
        w, h = width, max(1, round(width / min(view.ratio)))
    elif width / height > max(view.ratio):
        w, h = max(1, round(height * max(view.ratio))), height
    else:
        w, h = width, height
    return [(width - w) // 2, (height - h) // 2, w, h]


@given(views(), st.lists(st.tuples(sides, sides), min_size=1, max_size=5), seeds)
def test_boxes_are_those_of_the_plain_algorithm(view: ViewConfig, sizes: list[tuple[int, int]], seed: int) -> None:
    chance = streams(len(sizes), seed)
    boxes = draw_boxes(chance, "global", view, torch.tensor(sizes))
    numbers = chance.uniform("global/boxes", view.count, 10, 2).tolist()
    places = chance.uniform("global/places", view.count, 2).tolist()
    for b, (height, width) in enumerate(sizes):
        for v in range(view.count):
            assert boxes[v, b].tolist() == plain_box(view, numbers[b][v], places[b][v], height, width)


@pytest.mark.parametrize(
    ("size", "scale", "ratio"),
    [
        ((375, 500), (0.32, 1.0), (3 / 4, 4 / 3)),
        ((375, 500), (0.05, 0.32), (3 / 4, 4 / 3)),
        ((120, 30), (0.3, 1.0), (3 / 4, 4 / 3)),  # tall: the central crop is often the only one
        ((64, 64), (0.9, 1.0), (0.5, 2.0)),
    ],
)
def test_boxes_have_the_distribution_of_torchvision(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    count = 3000
    torch.manual_seed(0)
    transform = v2.RandomResizedCrop(8, scale=scale, ratio=ratio)
    image = torch.zeros(3, *size)
    theirs = [transform.make_params([image]) for _ in range(count)]
    reference = torch.tensor([[crop["left"], crop["top"], crop["width"], crop["height"]] for crop in theirs])
    view = ViewConfig(size=8, scale=scale, ratio=ratio)
    ours = draw_boxes(streams(count), "global", view, torch.tensor([size] * count))[0]
    together = (
        torch.cat([reference, reference[:, 2:].prod(1, keepdim=True)], 1),
        torch.cat([ours, ours[:, 2:].prod(1, keepdim=True)], 1),
    )
    for one, other in zip(together[0].T, together[1].T, strict=True):
        assert distance(one, other) < 1.95 * math.sqrt(2 / count)  # Kolmogorov-Smirnov at 0.1 %


def distance(one: Tensor, other: Tensor) -> float:
    """Largest difference of two samples' distribution functions (Kolmogorov-Smirnov)."""
    values = torch.cat([one, other]).unique()
    below = [torch.searchsorted(sample.sort().values, values, right=True) / len(sample) for sample in (one, other)]
    return float((below[0] - below[1]).abs().max())


@given(st.integers(1, 200), st.floats(1.4, 20), st.booleans())
def test_an_image_too_long_for_the_view_gives_its_centre_as_torchvision_does(
    short: int, stretch: float, tall: bool
) -> None:
    long = max(short * 2, int(short * stretch))
    size = (long, short) if tall else (short, long)
    transform = v2.RandomResizedCrop(8, scale=(1.0, 1.0))
    theirs = transform.make_params([torch.zeros(3, *size)])
    ours = draw_boxes(streams(1), "global", ViewConfig(size=8), torch.tensor([size]))[0, 0]
    assert ours.tolist() == [theirs["left"], theirs["top"], theirs["width"], theirs["height"]]


def test_flips_happen_as_often_as_asked() -> None:
    flips = draw_flips(streams(4000), "global", ViewConfig(size=8, count=2, flip=0.3))
    assert flips.shape == (2, 4000)
    assert (flips.float().mean(1) - 0.3).abs().max() < 5 * math.sqrt(0.3 * 0.7 / 4000)
    assert (flips[0] != flips[1]).any()
    assert not draw_flips(streams(100), "global", ViewConfig(size=8, flip=0)).any()
    assert draw_flips(streams(100), "global", ViewConfig(size=8, flip=1)).all()


# Pixels


@st.composite
def boxed(draw: st.DrawFn) -> tuple[int, int, list[int]]:
    height, width = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return height, width, [left, top, draw(st.integers(1, width - left)), draw(st.integers(1, height - top))]


@given(boxed(), st.booleans(), st.integers(2, 64), st.booleans())
def test_a_cut_is_torchvisions_resized_crop(
    case: tuple[int, int, list[int]], flip: bool, size: int, planar: bool
) -> None:
    height, width, box = case
    image = picture(height, width)
    image = image.contiguous() if planar else image
    left, top, wide, high = box
    expected = tv.resized_crop(
        image.contiguous(), top, left, high, wide, [size, size], InterpolationMode.BICUBIC, antialias=True
    )
    ours = cut(image, box, flip, size)
    assert ours.dtype == torch.uint8
    # Its two ways of resizing, by memory order, may round a value to either side of a half.
    difference = ours.int() - (tv.horizontal_flip(expected) if flip else expected).int()
    assert difference.abs().max() <= (0 if planar else 1)


@given(st.integers(1, 120), st.integers(1, 120), st.integers(2, 64))
def test_the_evaluation_crop_is_torchvisions(height: int, width: int, size: int) -> None:
    image = picture(height, width).contiguous()
    whole = v2.Resize(size, InterpolationMode.BICUBIC, antialias=True)(image)
    assert torch.equal(evaluation_crop(image, size), v2.CenterCrop(size)(whole))


def cut_all(images: list[Tensor], chance: Chance, settings: dict[str, ViewConfig]) -> Cutter:
    crops = Cutter(chance, settings)
    crops.place(range(len(images)), [(image.shape[1], image.shape[2]) for image in images])
    for place, image in enumerate(images):
        crops.cut(place, image)
    return crops


def test_all_crops_of_a_batch() -> None:
    settings = {
        "global": ViewConfig(size=16, count=2, scale=(0.4, 1.0)),
        "local": ViewConfig(size=8, count=3, scale=(0.1, 0.4), flip=1.0),
    }
    images, chance = [picture(40, 60, 1), picture(33, 21, 2), picture(9, 50, 3)], streams(3)
    sizes = torch.tensor([[40, 60], [33, 21], [9, 50]])
    crops = cut_all(images, chance, settings)
    for name, view in settings.items():
        boxes = draw_boxes(chance, name, view, sizes)
        assert crops.images[name].shape == (view.count, 3, 3, view.size, view.size)
        assert torch.equal(crops.relative_boxes()[name], relative_boxes(boxes, sizes))
        assert torch.equal(crops.flips[name], draw_flips(chance, name, view))
        for v in range(view.count):
            for b, image in enumerate(images):
                alone = cut(image, boxes[v, b].tolist(), bool(crops.flips[name][v, b]), view.size)
                assert torch.equal(crops.images[name][v, b], alone)


def test_the_crops_of_an_example_are_its_own_in_any_batch() -> None:
    settings = {"global": ViewConfig(size=8, count=2, scale=(0.2, 1.0))}
    images, chance = [picture(20 + k, 30, k) for k in range(6)], streams(6)
    whole = cut_all(images, chance, settings)
    few = cut_all([images[4], images[1]], Chance(chance.keys[[4, 1]]), settings)
    assert torch.equal(few.images["global"], whole.images["global"][:, [4, 1]])
    assert torch.equal(few.boxes["global"], whole.boxes["global"][:, [4, 1]])
    assert not torch.equal(whole.boxes["global"][0], whole.boxes["global"][1])  # two crops of a view differ


# Settings


def test_each_crop_may_look_different() -> None:
    own = PhotometricConfig(blur=0.3)
    view = ViewConfig(size=8, count=3, photometric=["dino_first", {"blur": 0.3}, "none"])
    assert view.looks == [PRESETS["dino_first"], own, PRESETS["none"]]
    assert ViewConfig(size=8, count=2, photometric="dino_local").looks == [PRESETS["dino_local"]] * 2
    assert ViewConfig(**view.model_dump(mode="json")) == view


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"size": 1}, "greater than or equal to 2"),
        ({"count": 0}, "greater than or equal to 1"),
        ({"scale": (0.5, 0.2)}, r"write \[low, high\]"),
        ({"scale": (0.0, 1.0)}, "greater than 0"),
        ({"scale": (0.5, 1.2)}, "less than or equal to 1"),
        ({"ratio": (0.0, 1.0)}, "greater than 0"),
        ({"flip": 1.5}, "less than or equal to 1"),
        ({"count": 2, "photometric": ["none"]}, "1 entries for 2 crops"),
        ({"photometric": "dino_fist"}, "did you mean 'dino_first'"),
        ({"photometric": {"blurr": 0.1}}, "Extra inputs"),
        ({"photometric": {"sigma": (2.0, 0.1)}}, r"write \[low, high\]"),
        ({"crops": 2}, "Extra inputs"),
    ],
)
def test_a_wrong_setting_is_explained(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        ViewConfig.model_validate({"size": 32} | wrong)
