"""Crops changed one by one become what they become in a batch."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from harmony.chance import Chance
from harmony.data import photometric
from harmony.data.one_by_one import OneByOne
from harmony.data.photometric import PRESETS, PhotometricConfig, apply, draw_photometric

LOOKS = [
    PRESETS["dino_first"],
    PRESETS["dino_second"],
    PRESETS["simclr"],
    PhotometricConfig(jitter=1, brightness=1, contrast=1, saturation=1, hue=0.5, blur=1, sigma=(0.05, 9)),
    PRESETS["none"],
]


@given(st.integers(0, 2**31), st.integers(2, 40))
def test_a_crop_becomes_what_it_becomes_in_a_batch(seed: int, size: int) -> None:
    chance = Chance.of_examples(seed, 0, torch.arange(4))
    drawn = draw_photometric(chance, "view", LOOKS)
    radius = photometric.blur_radius(LOOKS, size)
    images = torch.rand(4 * len(LOOKS), 3, size, size, generator=torch.Generator().manual_seed(seed))
    images[::3, :, 0] = images[::3, :1, 0]  # a grey line
    together = apply(images.clone(), drawn, radius)
    changer = OneByOne(drawn, radius, size)
    for crop in torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist():
        alone = images[crop].clone()
        changer.change(alone, crop)
        # A value that rounding moves over the threshold of solarize lands elsewhere altogether.
        off = (alone - together[crop]).abs() > 1e-5
        assert off.float().mean() <= (2e-2 if crop in drawn["solarize"] else 0)
    unchanged = slice(4 * LOOKS.index(PRESETS["none"]), None)
    assert torch.equal(together[unchanged], images[unchanged])
