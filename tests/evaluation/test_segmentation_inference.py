import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from harmony.evaluation.segmentation import inference
from harmony.evaluation.segmentation.inference import averaged, classes_at, slide, starts, stride_of


def pixelwise(windows):
    """A predictor that sees every pixel by itself: 4 classes from 3 colours."""
    return torch.einsum("bchw,kc->bkhw", windows, torch.arange(12.0).view(4, 3).sin())


def whole(windows):
    """One score a class from the whole window, as coarse as can be."""
    return pixelwise(windows).mean(dim=(2, 3), keepdim=True)


@given(st.integers(1, 200), st.integers(1, 64), st.integers(1, 64))
def test_windows_cover_everything_and_stay_inside(length, window, stride):
    stride = min(stride, window)
    places = starts(length, window, stride)
    assert places == sorted(set(places))
    assert places[0] == 0
    if length <= window:
        assert places == [0]
    else:
        assert places[-1] == length - window
        assert all(after - before <= stride for before, after in itertools.pairwise(places))
        assert len(places) == 1 + -(-(length - window) // stride)  # none more than is needed


def test_the_stride_is_whole_patches():
    assert stride_of(512, 2 / 3, 16) == 336
    assert stride_of(224, 2 / 3, 16) == 144
    assert stride_of(8, 0.1, 8) == 8
    assert stride_of(16, 1.0, 16) == 16


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_a_predictor_that_sees_single_pixels_gains_nothing_from_windows(batch_size):
    image = torch.randn(3, 37, 50)
    found = slide(pixelwise, image, 16, 10, batch_size)
    assert torch.allclose(found, pixelwise(image[None])[0], atol=1e-5)


def test_one_window_is_the_whole_image():
    image = torch.randn(3, 16, 16)
    expected = F.interpolate(whole(image[None]), (16, 16))[0]
    assert torch.allclose(slide(whole, image, 16, 8, 4), expected, atol=1e-6)


def test_what_windows_say_is_averaged_where_they_overlap():
    """Windows at 0 and 2 of a line of six: their means are 1.5 and 3.5."""
    image = torch.arange(6.0).expand(3, 4, 6)
    found = slide(lambda windows: windows.mean(dim=(1, 2, 3), keepdim=True), image, 4, 2, 8)
    assert found[0, 0].tolist() == [1.5, 1.5, 2.5, 2.5, 3.5, 3.5]


def test_a_constant_predictor_is_constant():
    found = slide(lambda windows: torch.full((len(windows), 5, 2, 2), 0.25), torch.randn(3, 45, 29), 16, 8, 4)
    assert found.shape == (5, 45, 29)
    assert torch.equal(found, torch.full_like(found, 0.25))


def test_a_small_image_is_filled_up_with_the_mean_colour():
    seen = []

    def predict(windows):
        seen.append(windows)
        return pixelwise(windows)

    image = torch.randn(3, 10, 30)
    found = slide(predict, image, 16, 8, 8)
    assert found.shape == (4, 10, 30)
    assert torch.allclose(found, pixelwise(image[None])[0], atol=1e-5)
    assert all(torch.equal(windows[:, :, 10:], torch.zeros(len(windows), 3, 6, 16)) for windows in seen)


def test_scales_and_mirror_images_are_averaged_as_probabilities():
    image = torch.randn(3, 12, 20)
    small = F.interpolate(image[None], (6, 10), mode="bilinear")[0]

    def left(pixels):
        """Prefers class 0 on the left, class 1 on the right: not the same for a mirror image."""
        ramp = torch.linspace(-3, 3, pixels.shape[2]).expand(1, *pixels.shape[1:])
        return torch.cat([-ramp + pixels[:1], ramp])

    assert torch.equal(averaged(left, [image], flip=False), left(image))
    flipped = averaged(left, [image], flip=True)
    expected = (left(image).softmax(0) + left(image.flip(-1)).softmax(0).flip(-1)) / 2
    assert torch.allclose(flipped, expected, atol=1e-6)
    both = averaged(left, [image, small], flip=False)
    enlarged = F.interpolate(left(small)[None], (12, 20), mode="bilinear")[0].softmax(0)
    assert torch.allclose(both, (left(image).softmax(0) + enlarged) / 2, atol=1e-6)


@given(st.integers(1, 12), st.integers(1, 400))
def test_enlarging_some_classes_at_a_time_changes_nothing(classes, at_once):
    scores = torch.randn(classes, 5, 7, generator=torch.Generator().manual_seed(classes))
    expected = F.interpolate(scores[None], (13, 10), mode="bilinear", align_corners=False)[0].argmax(0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(inference, "ENLARGED_AT_ONCE", at_once)
        assert torch.equal(classes_at(scores, (13, 10)), expected)


def test_of_equal_scores_the_first_class_wins(monkeypatch):
    monkeypatch.setattr(inference, "ENLARGED_AT_ONCE", 1)
    assert int(classes_at(torch.ones(5, 2, 2), (3, 3)).max()) == 0
    assert int(classes_at(torch.ones(5, 3, 3), (3, 3)).max()) == 0
