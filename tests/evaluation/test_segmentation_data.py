import numpy as np
import pytest
import torch
from PIL import Image
from segmentation_parts import Broken, Kept, squares

from harmony.data.sources import BadExample, Example
from harmony.errors import UserError
from harmony.evaluation.segmentation.crops import TrainingCrops
from harmony.evaluation.segmentation.data import (
    count_classes,
    read,
    resize_image,
    resize_mask,
    size_at,
)
from harmony.evaluation.segmentation.scores import IGNORE
from harmony.evaluation.settings import SegmentationConfig

MOST = 2**26


def crops_of(source, size=32, short=40, **config):
    settings = SegmentationConfig(**{"photometric": False, "train_batch_size": 4, "steps": 10} | config)
    return TrainingCrops(source, range(len(source)), settings, size, short, (0.5, 0.5, 0.5), MOST)


def white_square(height=60, width=80):
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[15:41, 20:59] = 1
    return torch.from_numpy(mask * 255).repeat(3, 1, 1), torch.from_numpy(mask).int()


@pytest.mark.parametrize("scale", [(0.5, 0.5), (1.0, 1.0), (2.0, 2.0), (0.5, 2.0)])
def test_mask_and_image_stay_aligned(scale):
    crops = crops_of(squares(1), scale=scale, most_of_one_class=1.0)
    image, mask = white_square()
    cuts, padded = set(), 0
    for seed in range(30):
        torch.manual_seed(seed)
        pixels, target = crops.crop(image, mask)
        assert (pixels.shape, target.shape) == ((3, 32, 32), (32, 32))
        outside = target == IGNORE
        assert (pixels[:, outside] == 128).all()  # the mean colour
        bright = pixels[0] > 127
        agree = (bright == (target == 1))[~outside]
        # Where they differ is the rim, where a pixel of the image is half of one and half of the other.
        rim = (pixels[0] > 5) & (pixels[0] < 250)
        assert (agree | rim[~outside]).all()
        assert agree.float().mean() > 0.95
        padded += bool(outside.any())
        cuts.add(tuple(target.flatten().tolist()))
    assert padded == 30 if scale[1] == 0.5 else padded < 30
    assert len(cuts) > 10 or scale[1] == 0.5  # there the whole image fits into the crop


def test_half_of_the_crops_are_mirrored():
    image, mask = white_square(32, 32)
    mask[:, 20:] = 1
    found = []
    for flip in (0.0, 0.5, 1.0):
        crops = crops_of(squares(1), size=32, short=32, flip=flip, scale=(1.0, 1.0), most_of_one_class=1.0)
        torch.manual_seed(0)
        found.append(sum(int(crops.crop(image, mask)[1][0, 0] == 1) for _ in range(40)))
    assert found[0] == 0
    assert 10 < found[1] < 30
    assert found[2] == 40


def test_a_crop_of_one_class_is_drawn_anew():
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    mask = torch.zeros(64, 64, dtype=torch.int32)
    mask[:, 52:] = 1  # most crops of 16 px show nothing of it

    def share(limit):
        crops = crops_of(squares(1), size=16, short=64, scale=(1.0, 1.0), most_of_one_class=limit)
        torch.manual_seed(0)
        both = [float(crops.crop(image, mask)[1].float().mean()) for _ in range(60)]
        return sum(0.25 <= one <= 0.75 for one in both) / len(both)

    assert share(0.75) > 0.7 > 0.4 > share(1.0)


def test_colours_change_and_masks_do_not():
    source = squares(4)
    plain, changed = crops_of(source), crops_of(source, photometric=True)
    before, after = plain[0], changed[0]
    assert not torch.equal(before[0], after[0])
    assert before[0].dtype == after[0].dtype == torch.uint8
    assert torch.equal(plain[1][1], plain[1][1])


def test_a_batch_is_a_function_of_its_step():
    crops = crops_of(squares(9), photometric=True)
    first = crops[5]
    torch.manual_seed(123)
    assert all(torch.equal(one, other) for one, other in zip(first, crops[5], strict=True))
    assert not torch.equal(first[0], crops[6][0])


def test_resizing_keeps_the_centre_of_things():
    """A mask enlarged by 3 and made small again is what it was; its things lie where the image's lie."""
    image, mask = white_square()
    assert torch.equal(resize_mask(resize_mask(mask, (180, 240)), (60, 80)), mask)
    small_image, small = resize_image(image, (20, 27)), resize_mask(mask, (20, 27))
    bright = (small_image[0] > 127).nonzero().float().mean(0)
    assert torch.allclose(small.nonzero().float().mean(0), bright, atol=0.35)
    assert size_at(60, 80, 30) == (30, 40)
    assert size_at(61, 80, None, 0.5) == (30, 40)
    assert size_at(480, 360, 224) == (299, 224)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_masks_are_read_with_what_belongs_to_no_class(kind):
    values = np.array([[0, 1, 2], [2, 255, 0]], dtype=kind)
    source = Kept([Example("a", Image.new("RGB", (3, 2)), mask=values)], ["x", "y", "z"])
    key, image, found = read(source, 0, MOST)
    assert (key, image.shape) == ("a", (3, 2, 3))
    assert found.tolist() == [[0, 1, 2], [2, IGNORE, 0]]


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (None, "has no mask"),
        (np.full((2, 3), 3, dtype=np.uint8), "value 3, which is neither one of the classes 0 .. 2 nor 255"),
        (np.full((2, 3), -1), "value -1"),
        (np.zeros((3, 2), dtype=np.uint8), "is 3 x 2 px and its mask 2 x 3"),
        (np.zeros((2, 3, 3), dtype=np.uint8), "one class index a pixel"),
        (np.zeros((2, 3)), "one class index a pixel"),
    ],
)
def test_masks_that_cannot_be_used_say_why(mask, reason):
    with pytest.raises(BadExample, match=reason) as bad:
        read(Kept([Example("a", Image.new("RGB", (3, 2)), mask=mask)], ["x", "y", "z"]), 0, MOST)
    assert bad.value.key == "a"


def test_training_leaves_out_what_cannot_be_used(capsys):
    source = squares(5)
    source.examples[2] = Example("odd", source.examples[2].image, mask=np.full((40, 56), 77, dtype=np.uint8))
    counted = count_classes(source, 0, MOST)
    assert counted.usable == [0, 1, 3, 4]
    assert [key for key, _ in counted.bad] == ["odd"]
    whole = np.concatenate([e.mask.ravel() for e in source.examples if e.key != "odd"])
    assert counted.pixels.tolist() == [int((whole == value).sum()) for value in range(7)]
    assert "1 example of squares: cannot be used and is left out: odd has a mask" in " ".join(
        capsys.readouterr().err.split()
    )


def test_training_on_nothing_is_refused():
    with pytest.raises(UserError, match=r"no example of kept: can be used: broken-0 is truncated"):
        count_classes(Broken(squares(2).examples, ["a"]), 0, MOST)
    single = Kept([Example("a", Image.new("RGB", (3, 2)), mask=np.full((2, 3), 1, np.uint8))], ["x", "y"])
    with pytest.raises(UserError, match="all labelled pixels of kept: are 'y'; learning needs two classes or more"):
        count_classes(single, 0, MOST)
    empty = Kept([Example("a", Image.new("RGB", (3, 2)), mask=np.full((2, 3), 255, np.uint8))], ["x"])
    with pytest.raises(UserError, match="no pixel of kept: belongs to a class"):
        count_classes(empty, 0, MOST)


def test_data_that_change_during_the_training_are_refused():
    source = squares(4)
    crops = crops_of(source)
    source.examples = [Example(e.key, e.image) for e in source.examples]
    with pytest.raises(UserError, match=r"has changed during the training: square-\d: has no mask"):
        crops[0]
