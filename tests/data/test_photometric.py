"""Changes of colour and sharpness: each against torchvision's on one image, the draws against its distributions."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from harmony.chance import Chance
from harmony.data import photometric, pixels
from harmony.data.batch import Batch
from harmony.data.photometric import PRESETS, PhotometricConfig, augment, blur_radius, draw_photometric
from harmony.data.views import ViewConfig

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
seeds = st.integers(0, 2**31)
EVERYTHING = PhotometricConfig(
    jitter=0.8,
    brightness=0.6,
    contrast=0.7,
    saturation=0.8,
    hue=0.4,
    grayscale=0.2,
    blur=0.5,
    solarize=0.4,
    threshold=100,
)


def streams(count: int, seed: int = 0) -> Chance:
    return Chance.of_examples(seed, 0, torch.arange(count))


def pictures(count: int, size: int, seed: int) -> Tensor:
    """(count, 3, size, size) in [0, 1]: noise, with grey, black, white and one-coloured patches."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, size, size, generator=generator)
    images[:, :, 0, 0] = torch.rand(count, 1, generator=generator)
    images[:, :, 0, 1], images[:, :, 1, 0] = 0, 1
    images[:, :2, 1, 1] = images[:, 2:, 1, 1] = 0.5
    images[:, 0, 2, 2] = images[:, 1, 2, 2]  # two channels are the largest
    images[:, :, 2] = (images[:, :, 2] * 4).round() / 4
    return images


# Each change, image by image


@given(seeds, st.sampled_from(["brightness", "contrast", "saturation"]))
def test_blends_are_torchvisions(seed: int, name: str) -> None:
    images = pictures(5, 7, seed)
    factor = torch.rand(5, generator=torch.Generator().manual_seed(seed)) * 2
    is_grey, is_mean = (torch.full((5,), float(name == kind)) for kind in ("saturation", "contrast"))
    change = {"brightness": tv.adjust_brightness, "contrast": tv.adjust_contrast, "saturation": tv.adjust_saturation}
    expected = torch.stack([change[name](image, float(f)) for image, f in zip(images, factor, strict=True)])
    torch.testing.assert_close(pixels.blend(images, is_grey, is_mean, factor), expected, rtol=0, atol=1e-6)


@given(seeds)
def test_the_turn_of_the_hue_is_torchvisions(seed: int) -> None:
    images = pictures(5, 7, seed)
    turn = torch.rand(5, generator=torch.Generator().manual_seed(seed)) - 0.5
    expected = torch.stack([tv.adjust_hue(image, float(t)) for image, t in zip(images, turn, strict=True)])
    torch.testing.assert_close(pixels.turn_hue(images, turn), expected, rtol=0, atol=2e-6)


@given(seeds, st.integers(1, 6))
def test_the_blur_is_torchvisions(seed: int, radius: int) -> None:
    images = pictures(5, 7, seed)
    sigma = 0.1 + 1.9 * torch.rand(5, generator=torch.Generator().manual_seed(seed))
    expected = torch.stack(
        [tv.gaussian_blur(image, [2 * radius + 1] * 2, [float(s)] * 2) for image, s in zip(images, sigma, strict=True)]
    )
    torch.testing.assert_close(pixels.gaussian_blur(images, sigma, radius), expected, rtol=0, atol=2e-6)


@given(seeds)
def test_solarize_and_greyscale_are_torchvisions(seed: int) -> None:
    images = pictures(5, 7, seed)
    threshold = torch.rand(5, generator=torch.Generator().manual_seed(seed))
    expected = torch.stack([tv.solarize(image, float(t)) for image, t in zip(images, threshold, strict=True)])
    torch.testing.assert_close(pixels.solarize(images, threshold), expected, rtol=0, atol=1e-6)
    greyed = torch.stack([tv.rgb_to_grayscale(image, num_output_channels=1) for image in images])
    torch.testing.assert_close(pixels.grey(images), greyed, rtol=0, atol=1e-6)


def test_solarize_inverts_the_very_bytes_that_pillow_does() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    drawn = draw_photometric(streams(1), "global", [PhotometricConfig(solarize=1)])
    changed = photometric.apply(values.float() / 255, drawn, 1) * 255
    inverted = torch.where(values >= 128, 255 - values.int(), values.int())
    torch.testing.assert_close(changed, inverted.float(), rtol=0, atol=1e-4)


# All of them together


def change_one(image: Tensor, drawn: dict[str, Tensor], crop: int, radius: int) -> Tensor:
    """What the drawn parameters say of one crop, done by torchvision in their order."""
    blends: dict[tuple[float, float], Callable[[Tensor, float], Tensor]] = {
        (0.0, 0.0): tv.adjust_brightness,
        (1.0, 0.0): tv.adjust_saturation,
        (0.0, 1.0): tv.adjust_contrast,
    }
    for k in range(4):
        if crop in drawn[f"hue_{k}"]:
            image = tv.adjust_hue(image, float(drawn["turn"][crop]))
        if k < 3:
            kind = float(drawn["to_grey"][crop, k]), float(drawn["to_mean"][crop, k])
            image = blends[kind](image, float(drawn["factor"][crop, k]))
    if crop in drawn["grey"]:
        image = tv.rgb_to_grayscale(image, num_output_channels=3)
    if crop in drawn["blur"]:
        image = tv.gaussian_blur(image, [2 * radius + 1] * 2, [float(drawn["sigma"][crop])] * 2)
    if crop in drawn["solarize"]:
        image = tv.solarize(image, float(drawn["threshold"][crop]))
    return image


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("one_by_one_from", [0, 2**30])
def test_a_batch_is_changed_as_torchvision_changes_each_crop(
    size: int, one_by_one_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photometric, "_ONE_BY_ONE", one_by_one_from)
    view = ViewConfig(size=size, count=3, photometric=[EVERYTHING, PRESETS["dino_second"], PhotometricConfig(blur=0.5)])
    chance = streams(20)
    crops = torch.randint(0, 256, (3, 20, 3, size, size), dtype=torch.uint8)
    drawn = draw_photometric(chance, "global", view.looks)
    batch = Batch(keys=["x"] * 20, chance=chance, images={"global": crops}, photometric={"global": drawn})
    ours = augment(batch, {"global": view}, MEAN, STD).images["global"]
    radius = blur_radius(view.looks, size)
    assert radius == min(6, size - 1)
    for crop, image in enumerate(crops.flatten(0, 1)):
        changed = change_one(image.float() / 255, drawn, crop, radius)
        expected = tv.normalize(changed, list(MEAN), list(STD))
        got = ours.flatten(0, 1)[crop]
        # A value that rounding moves over the threshold of solarize lands elsewhere altogether.
        off = (got - expected).abs() > 1e-4
        assert off.float().mean() < (2e-3 if crop in drawn["solarize"] else 1e-9)


def test_no_change_is_only_the_normalisation() -> None:
    view = ViewConfig(size=5, count=2)
    crops = torch.randint(0, 256, (2, 3, 3, 5, 5), dtype=torch.uint8)
    batch = Batch(keys=list("abc"), chance=streams(3), images={"global": crops})
    expected = tv.normalize(crops.float() / 255, list(MEAN), list(STD))
    assert torch.equal(augment(batch, {"global": view}, MEAN, STD).images["global"], expected)
    assert torch.equal(batch.images["global"], crops)  # and the batch itself is left alone


# The draws


def drawn_jitter(count: int) -> dict[str, Tensor]:
    return draw_photometric(streams(count), "global", [EVERYTHING.model_copy(update={"jitter": 1.0})])


def test_the_strengths_have_the_distribution_of_torchvision() -> None:
    count = 4000
    torch.manual_seed(0)
    jitter = v2.ColorJitter(brightness=0.6, contrast=0.7, saturation=0.8, hue=0.4)
    theirs = [jitter.make_params([]) for _ in range(count)]
    drawn = drawn_jitter(count)
    is_kind = {
        "saturation_factor": drawn["to_grey"] == 1,
        "contrast_factor": drawn["to_mean"] == 1,
        "brightness_factor": (drawn["to_grey"] == 0) & (drawn["to_mean"] == 0),
    }
    ours = {name: drawn["factor"][chosen] for name, chosen in is_kind.items()} | {"hue_factor": drawn["turn"]}
    for name, values in ours.items():
        reference = torch.tensor([float(params[name]) for params in theirs])
        assert len(values) == count
        both = torch.cat([values, reference]).unique()
        below = [torch.searchsorted(sample.sort().values, both, right=True) / count for sample in (values, reference)]
        assert (below[0] - below[1]).abs().max() < 1.95 * math.sqrt(2 / count)  # Kolmogorov-Smirnov at 0.1 %


def test_every_order_of_the_jitter_is_equally_frequent() -> None:
    count = 4800
    drawn = drawn_jitter(count)
    hue_place = torch.zeros(count, dtype=torch.long)
    for k in range(4):
        hue_place[drawn[f"hue_{k}"]] = k
    kinds = torch.where(drawn["to_grey"] == 1, 2, torch.where(drawn["to_mean"] == 1, 1, 0)).tolist()
    orders = [(*three[:k], 3, *three[k:]) for three, k in zip(kinds, hue_place.tolist(), strict=True)]
    often = [orders.count(order) for order in permutations(range(4))]
    assert sum(often) == count
    assert max(abs(times - 200) for times in often) < 4.5 * math.sqrt(200)


@pytest.mark.parametrize("name", ["dino_first", "dino_second", "dino_local", "simclr", "moco_v2"])
def test_changes_happen_as_often_as_the_preset_says(name: str) -> None:
    look, count = PRESETS[name], 4000
    drawn = draw_photometric(streams(count), "global", [look])
    jittered = sum(len(drawn[f"hue_{k}"]) for k in range(4))
    happened = [jittered, len(drawn["grey"]), len(drawn["blur"]), len(drawn["solarize"])]
    for times, probability in zip(happened, (look.jitter, look.grayscale, look.blur, look.solarize), strict=True):
        assert abs(times / count - probability) <= 5 * math.sqrt(probability * (1 - probability) / count)
    assert (drawn["factor"] != 1).any(1).sum() == jittered  # all four parts of the jitter, or none
    assert drawn["sigma"].min() >= look.sigma[0]
    assert drawn["sigma"].max() <= look.sigma[1]


def test_each_crop_follows_its_own_settings() -> None:
    drawn = draw_photometric(streams(50), "global", [PRESETS["dino_first"], PRESETS["none"]])
    assert torch.equal(drawn["blur"], torch.arange(50))  # every first crop, no second one
    assert max(int(drawn[name].max()) for name in ("grey", "hue_0", "hue_3")) < 50
    assert (drawn["factor"][50:] == 1).all()
    assert draw_photometric(streams(50), "global", [PRESETS["none"]] * 2) == {}


# Where it runs, and with whom


def full_batch(count: int, views: dict[str, ViewConfig], chosen: Tensor | None = None) -> Batch:
    """Examples 0 .. count-1, or the chosen ones, with parameters drawn."""
    chance = streams(count)
    generator = torch.Generator().manual_seed(1)
    images = {
        name: torch.randint(0, 256, (v.count, count, 3, v.size, v.size), dtype=torch.uint8, generator=generator)
        for name, v in views.items()
    }
    if chosen is not None:
        chance, images = Chance(chance.keys[chosen]), {name: crops[:, chosen] for name, crops in images.items()}
    drawn = {name: draw_photometric(chance, name, view.looks) for name, view in views.items()}
    return Batch(keys=["x"] * len(chance), chance=chance, images=images, photometric=drawn)


VIEWS = {
    "global": ViewConfig(size=24, count=2, photometric=[EVERYTHING, "dino_first"]),
    "local": ViewConfig(size=9, count=3, photometric="dino_local"),
}


def test_an_example_is_changed_alike_in_any_batch() -> None:
    chosen = torch.tensor([5, 11, 2])
    whole = augment(full_batch(12, VIEWS), VIEWS, MEAN, STD)
    few = augment(full_batch(12, VIEWS, chosen), VIEWS, MEAN, STD)
    for name in VIEWS:
        torch.testing.assert_close(few.images[name], whole.images[name][:, chosen], rtol=0, atol=1e-5)


def test_the_order_of_bytes_in_memory_does_not_matter() -> None:
    batch = full_batch(4, VIEWS)
    by_pixel = {
        name: crops.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3) for name, crops in batch.images.items()
    }
    for name, crops in augment(replace(batch, images=by_pixel), VIEWS, MEAN, STD).images.items():
        assert crops.is_contiguous()
        assert torch.equal(crops, augment(batch, VIEWS, MEAN, STD).images[name])


def test_parameters_are_the_same_when_drawn_late() -> None:
    batch = full_batch(6, VIEWS)
    late = augment(replace(batch, photometric={}), VIEWS, MEAN, STD)
    for name, crops in augment(batch, VIEWS, MEAN, STD).images.items():
        assert torch.equal(crops, late.images[name])


def test_pieces_for_the_cache_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = full_batch(12, VIEWS)
    whole = augment(batch, VIEWS, MEAN, STD)
    monkeypatch.setattr(photometric, "_CHUNK", 5 * 3 * 24 * 24)  # five of the large crops at a time, of 24
    pieces = augment(batch, VIEWS, MEAN, STD)
    for name in VIEWS:
        torch.testing.assert_close(pieces.images[name], whole.images[name], rtol=0, atol=1e-5)


def test_the_device_is_never_asked_for_a_number() -> None:
    """On "meta" tensors have no values, so whatever would wait for one fails."""
    batch = full_batch(4, VIEWS).to("meta")
    with pytest.raises((NotImplementedError, RuntimeError)):
        batch.photometric["global"]["blur"].nonzero().tolist()
    changed = augment(batch, VIEWS, MEAN, STD)
    assert {name: crops.shape for name, crops in changed.images.items()} == {
        "global": (2, 4, 3, 24, 24),
        "local": (3, 4, 3, 9, 9),
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_changes_as_a_cpu_and_without_waiting() -> None:
    batch = full_batch(16, VIEWS)
    there = batch.to("cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        changed = augment(there, VIEWS, MEAN, STD)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, crops in augment(batch, VIEWS, MEAN, STD).images.items():
        off = (changed.images[name].cpu() - crops).abs() > 1e-4
        assert off.float().mean() < 1e-3  # at the threshold of solarize a rounding counts
