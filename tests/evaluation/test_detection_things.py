"""What changes an image changes the things on it: boxes and masks stay where the thing is."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from harmony.data.sources import BadExample, Example, Source, open_source
from harmony.data.sources.base import Objects
from harmony.errors import UserError
from harmony.evaluation.detection.batches import DetectionBatches, target
from harmony.evaluation.detection.evaluator import decoded
from harmony.evaluation.detection.finding import WholeImages, put_back
from harmony.evaluation.detection.things import Scene, cropped, fitted, flipped, jittered, padded, read, resized
from harmony.evaluation.seeds import seeded
from harmony.evaluation.settings import DetectionConfig

GROUND = torch.tensor([0, 0, 40], dtype=torch.uint8)


class Pages(Source):
    """White rectangles on a dark ground, class 0 on the left and 1 on the right; every fourth cannot be read."""

    def __init__(self, count=8, sides=(60, 90), with_masks=True, bad=4):
        self.uri, self.sides, self.count, self.bad = "pages:", sides, count, bad
        self.object_names, self.has_object_masks = ["left", "right"], with_masks

    def __len__(self):
        return self.count

    def key(self, i):
        return f"page-{i}"

    def fingerprint(self):
        return f"{self.uri}{self.count}{self.sides}"

    def __getitem__(self, i):
        if self.bad and i % self.bad == self.bad - 1:
            raise BadExample(self.key(i), "is truncated (test)")
        high, wide = self.sides
        boxes = np.array([[4 + i, 5, 24 + i, 35], [wide / 2 + 5, 10, wide - 8, 50], [3, 3, 3, 9]], dtype=np.float32)
        picture = np.broadcast_to(GROUND.numpy(), (high, wide, 3)).copy()
        masks = np.zeros((3, high, wide), dtype=bool)
        for mask, (left, top, right, bottom) in zip(masks, boxes.astype(int), strict=True):
            mask[top:bottom, left:right] = True
            picture[mask] = 255
        things = Objects(
            boxes,
            np.array([0, 1, 0]),
            np.array([False] * 3),
            masks.sum((1, 2)).astype(np.float32),
            (lambda: masks) if self.has_object_masks else None,
            i,
        )
        return Example(self.key(i), Image.fromarray(picture), objects=things)


def scene_of(position=0):
    return read(Pages(), position, 10**6, True)


def agrees(scene: Scene, slack: float) -> bool:
    """Whether each box lies around its mask, and each mask on the white of its thing."""
    for box, mask in zip(scene.boxes, scene.masks > 0, strict=True):
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        if not len(rows):
            return False
        around = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        if (around - box).abs().max() > slack or scene.image[:, mask].float().mean() < 150:
            return False
    return True


def test_reading_leaves_out_and_counts_boxes_without_an_area():
    scene = scene_of(1)
    assert scene.boxes.tolist() == [[5, 5, 25, 35], [50, 10, 82, 50]]
    assert scene.empty == 1
    assert len(scene.masks) == len(scene.areas) == 2
    assert agrees(scene, 0)
    assert read(Pages(with_masks=False), 1, 10**6, True).masks is None


def test_scenes_of_the_generator_are_read():
    source = open_source("scenes:train?things=shape&size=64")
    scene = read(source, 3, 10**6, True)
    assert scene.masks.shape == (len(scene.boxes), 64, 64)
    around = replace(scene, image=torch.where((scene.masks > 0).any(0), 255, 0).to(torch.uint8).expand(3, -1, -1))
    assert agrees(around, 1)


@given(st.integers(0, 10**6), st.floats(0.2, 1.5), st.floats(0, 1.5), st.sampled_from([0, 1, 2]))
def test_jitter_keeps_things_together(seed, low, more, position):
    with seeded("test", seed):
        scene = jittered(scene_of(position), 96, (low, low + more), 0.5)
    assert max(scene.sides) <= 96
    assert scene.image.shape[1:] == scene.masks.shape[1:] == scene.sides
    assert len(scene.boxes) == len(scene.labels) == len(scene.masks) == len(scene.crowd) == len(scene.areas)
    assert ((scene.boxes >= 0) & (scene.boxes <= torch.tensor([scene.sides[1], scene.sides[0]] * 2))).all()
    kept = (scene.boxes[:, 2:] - scene.boxes[:, :2] > 4).all(1)  # of slivers the antialiased image shows little
    assert agrees(scene.only(kept), 1.01)


def test_mirroring_and_resizing_by_hand():
    scene = scene_of()
    assert flipped(scene).boxes.tolist() == [[90 - 24, 5, 90 - 4, 35], [8, 10, 40, 50]]
    assert agrees(flipped(scene), 0)
    twice = resized(scene, 120, 180)
    assert twice.boxes.tolist() == [[8, 10, 48, 70], [100, 20, 164, 100]]
    assert agrees(twice, 0.01)
    assert agrees(resized(scene, 40, 30), 1)


def test_things_off_the_part_are_left_out_and_cut_ones_redrawn():
    scene = scene_of()
    part = cropped(scene, 20, 10, 30, 30)
    assert part.boxes.tolist() == [[0, 0, 14, 15]]
    assert part.labels.tolist() == [0]
    assert agrees(part, 0)
    masks = scene.masks.clone()
    masks[0, :, 12:] = 0  # the thing ends where its box does not
    assert cropped(replace(scene, masks=masks), 20, 10, 30, 30).boxes.tolist() == [[0, 0, 2, 15]]
    masks[0] = 0
    assert len(cropped(replace(scene, masks=masks), 20, 10, 30, 30).boxes) == 0
    assert len(cropped(replace(scene, masks=None), 20, 10, 30, 30).boxes) == 1


def test_whole_images_fit_and_findings_are_put_back():
    images = WholeImages(Pages(), [0, 1, 3], 64, GROUND, 10**6, True, 8)
    views = images[0]
    assert [page.position for page in views.pages] == [0, 1]
    assert views.bad == [("page-3", "is truncated (test)")]
    assert views.sizes == [(43, 64), (43, 64)]
    assert (views.pixels[0, :, 43:] == GROUND.view(3, 1, 1)).all()
    # Truth, found in the pixels of the view, is the truth again.
    small = resized(scene_of(), 43, 64)
    found = {"boxes": small.boxes, "labels": small.labels + 1, "scores": torch.tensor([0.9, 0.8])}
    put_back(views.pages[0], (43, 64), found | {"masks": torch.ones(2, 28, 28)})
    for truth, thing in zip(views.pages[0].truth, views.pages[0].found, strict=True):
        assert thing["bbox"] == pytest.approx(truth["bbox"], abs=1e-4)
        assert thing["category_id"] == truth["category_id"]
        assert (decoded(thing["segmentation"]) != decoded(truth["segmentation"])).sum() == 0


def test_padding_and_fitting():
    out = padded(torch.full((3, 2, 3), 9, dtype=torch.uint8), 4, GROUND)
    assert (out[:, :2, :3] == 9).all()
    assert (out[:, 2:] == GROUND.view(3, 1, 1)).all()
    assert fitted((60, 90), 30) == (20, 30)
    assert fitted((1, 4000), 64) == (1, 64)


CONFIG = DetectionConfig(train_batch_size=4, steps=3)


def test_batches_are_functions_of_the_step_and_replace_what_cannot_be_read():
    batches = DetectionBatches(Pages(), CONFIG, 64, (0.0, 0.0, 40 / 255), 10**6, True)
    batch, again = batches[1], batches[1]
    assert batch.pixels.shape == (4, 3, 64, 64)
    assert torch.equal(batch.pixels, again.pixels)
    assert not torch.equal(batch.pixels, batches[0].pixels)
    assert {*batch.bad, *batches[0].bad} == {
        "page-3: is truncated (test)",
        "page-7: is truncated (test)",
    }
    for one in batch.targets:
        assert one["masks"].shape == (len(one["boxes"]), 64, 64)
        assert set(one["labels"].tolist()) <= {1, 2}


def test_training_data_without_a_readable_image_are_refused():
    with pytest.raises(UserError, match=r"in a row cannot be read: page-\d: is truncated"):
        DetectionBatches(Pages(bad=1), CONFIG, 64, (0.0, 0.0, 0.0), 10**6, True)[0]


def test_crowds_are_set_apart():
    scene = replace(scene_of(), crowd=torch.tensor([False, True]))
    made = target(scene, 96)
    assert made["boxes"].tolist() == [[4, 5, 24, 35]]
    assert made["labels"].tolist() == [1]
    assert made["crowd"].tolist() == [[50, 10, 82, 50]]
    assert made["masks"].shape == (1, 96, 96)


@pytest.mark.parametrize("fault", ["label", "box", "mask"])
def test_things_that_do_not_fit_their_image_are_bad_examples(fault):
    class Faulty(Pages):
        def __getitem__(self, i):
            example = super().__getitem__(i)
            things = example.objects
            changed = {
                "label": lambda: replace(things, labels=np.array([0, 2, 0])),
                "box": lambda: replace(things, boxes=things.boxes * np.float32("nan")),
                "mask": lambda: replace(things, masks=lambda: things.masks()[:, :-1]),
            }[fault]()
            return replace(example, objects=changed)

    with pytest.raises(BadExample, match="page-0"):
        read(Faulty(), 0, 10**6, True)
