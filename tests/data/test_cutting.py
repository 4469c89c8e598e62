"""How small an image may be decoded for its crops, and what is then cut from it."""

import numpy as np
import pytest
import torch
from data_files import encoded, picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from harmony.chance import Chance
from harmony.data.cutting import Cutter, cut
from harmony.data.decode import Opened, decode
from harmony.data.views import ViewConfig, draw_boxes

VIEWS = {
    "large": ViewConfig(size=24, count=2, scale=(0.4, 1.0)),
    "small": ViewConfig(size=8, count=3, scale=(0.1, 0.4)),
}
seeds = st.integers(0, 2**31)


def cutter(count: int = 1, seed: int = 0, views: dict[str, ViewConfig] | None = None) -> Cutter:
    return Cutter(Chance.of_examples(seed, 0, torch.arange(count)), views or VIEWS)


def smooth(width: int, height: int) -> Image.Image:
    """A picture without detail, so that it looks the same however it is made smaller."""
    return picture(3, (6, 5)).resize((width, height), Image.Resampling.BICUBIC)


@given(st.lists(st.tuples(st.integers(4, 900), st.integers(4, 900)), min_size=1, max_size=4), seeds)
def test_an_image_is_decoded_as_small_as_leaves_every_crop_its_pixels(sizes: list[tuple[int, int]], seed: int) -> None:
    crops = cutter(len(sizes), seed)
    reductions = crops.place(range(len(sizes)), sizes)
    for b, reduction in enumerate(reductions):
        sides = [(boxes[:, b, 2:].min().item(), VIEWS[name].size) for name, boxes in crops.boxes.items()]
        fits = [by for by in (1, 2, 4, 8) if all(side // by >= size for side, size in sides)]
        assert reduction == max(fits, default=1)


@given(st.integers(60, 700), st.integers(60, 700), seeds)
def test_crops_of_a_reduced_image_lie_where_those_of_the_whole_one_do(height: int, width: int, seed: int) -> None:
    crops = cutter(1, seed)
    (reduction,) = crops.place([0], [(height, width)])
    whole = crops.relative_boxes()
    small = torch.zeros(3, -(-height // reduction), -(-width // reduction), dtype=torch.uint8)
    crops.cut(0, small, reduction)
    pixel = reduction / min(height, width)
    for name, shares in crops.relative_boxes().items():
        boxes = crops.boxes[name][:, 0]
        assert (boxes >= 0).all()
        assert (boxes[:, :2] + boxes[:, 2:] <= torch.tensor([small.shape[2], small.shape[1]])).all()
        if reduction > 1:
            assert (boxes[:, 2:] >= VIEWS[name].size).all()
        assert (shares - whole[name]).abs().max() <= pixel + 1e-6
        assert (shares[..., :2] + shares[..., 2:]).max() <= 1 + 1e-6


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_reduced_jpeg_gives_the_crops_of_the_whole_one(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(smooth(645, 483), "JPEG", quality=95, exif=exif)
    views = {"v": ViewConfig(size=32, count=4, scale=(0.3, 0.9))}
    small, whole = cutter(views=views), cutter(views=views)
    opened = Opened(data)
    (reduction,) = small.place([0], [opened.size])
    assert reduction == 8
    pixels = opened.pixels(reduction)
    assert pixels.shape == ((3, 61, 81) if orientation == 1 else (3, 81, 61))
    small.cut(0, pixels, reduction)
    whole.place([0], [Opened(data).size])
    whole.cut(0, decode(data))
    assert torch.equal(small.flips["v"], whole.flips["v"])
    difference = (small.images["v"].int() - whole.images["v"].int()).abs().float()
    assert difference.mean() < 4  # half a pixel of 61 aside at most


def test_what_is_no_jpeg_is_decoded_whole_and_cut_all_the_same() -> None:
    data = encoded(smooth(640, 480))
    views = {"v": ViewConfig(size=16, scale=(0.3, 0.9))}
    asked, plain = cutter(views=views), cutter(views=views)
    opened = Opened(data)
    (reduction,) = asked.place([0], [opened.size])
    assert reduction == 8
    asked.cut(0, opened.pixels(reduction), reduction)
    plain.place([0], [(480, 640)])
    plain.cut(0, decode(data))
    assert torch.equal(asked.images["v"], plain.images["v"])
    assert torch.equal(asked.boxes["v"], plain.boxes["v"])


def test_an_image_of_another_size_than_its_header_says_is_placed_anew() -> None:
    image = torch.from_numpy(np.asarray(smooth(120, 90))).permute(2, 0, 1)
    told_wrongly, right = cutter(2), cutter(2)
    told_wrongly.place([0, 1], [(90, 120), (50, 40)])
    right.place([0, 1], [(90, 120), (90, 120)])
    for crops in (told_wrongly, right):
        crops.cut(0, image)
        crops.cut(1, image)
    for name in VIEWS:
        assert torch.equal(told_wrongly.images[name], right.images[name])
        assert torch.equal(told_wrongly.relative_boxes()[name], right.relative_boxes()[name])


def test_pixels_keep_the_order_of_the_decoder() -> None:
    crops = cutter(2)
    image = decode(encoded(smooth(50, 40)))
    crops.place([0, 1], [(40, 50)] * 2)
    crops.cut(1, image)
    boxes = draw_boxes(Chance.of_examples(0, 0, torch.arange(2)), "small", VIEWS["small"], torch.tensor([[40, 50]] * 2))
    for name, view in VIEWS.items():
        assert crops.images[name].shape == (view.count, 2, 3, view.size, view.size)
        assert crops.images[name].permute(0, 1, 3, 4, 2).is_contiguous()
    alone = cut(image, boxes[2, 1].tolist(), bool(crops.flips["small"][2, 1]), 8)
    assert torch.equal(crops.images["small"][2, 1], alone)


@given(st.integers(100, 300), st.integers(100, 300), st.sampled_from([2, 4, 8]))
def test_a_reduction_rounds_sides_up_and_keeps_the_picture(width: int, height: int, reduction: int) -> None:
    data = encoded(smooth(width, height), "JPEG", quality=95, subsampling=0)
    small = Opened(data).pixels(reduction)
    assert small.shape == (3, -(-height // reduction), -(-width // reduction))
    rows, columns = height // reduction, width // reduction
    whole = decode(data)[:, : rows * reduction, : columns * reduction].float()
    means = whole.unflatten(2, (columns, reduction)).unflatten(1, (rows, reduction)).mean((2, 4))
    assert (small[:, :rows, :columns] - means).abs().mean() < 2
