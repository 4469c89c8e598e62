"""COCO's average precision: by hand, at its ends, and as pycocotools finds it."""

import base64
import contextlib
import copy
import io

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from harmony.evaluation.detection.details import details_of
from harmony.evaluation.detection.evaluator import NUMBERS, Page, decoded, encoded, evaluate

NAMES = ["cat", "dog", "hen"]


def disc(box, height=120, width=160):
    left, top, wide, high = box
    y, x = np.mgrid[:height, :width] + 0.5
    inside = ((x - left - wide / 2) / (wide / 2)) ** 2 + ((y - top - high / 2) / (high / 2)) ** 2 <= 1
    return inside.astype(np.uint8)


def thing(label, box, crowd=0, **more):
    mask = disc(box)
    runs = encoded(mask)
    return {
        "category_id": label,
        "bbox": list(box),
        "area": float(mask.sum()),
        "iscrowd": crowd,
        "segmentation": runs,
    } | more


def found(label, box, score):
    return {"category_id": label, "bbox": list(box), "score": score, "segmentation": encoded(disc(box))}


def page(position, truth, finds):
    return Page(position, 120, 160, truth, finds)


def perfect(pages):
    for one in pages:
        one.found = [found(t["category_id"], t["bbox"], 0.9) for t in one.truth if not t["iscrowd"]]
    return pages


def random_pages(seed, count=12):
    random = np.random.default_rng(seed)

    def box():
        wide, high = random.uniform(6, 110, 2)
        return [random.uniform(0, 160 - wide), random.uniform(0, 120 - min(high, 119)), wide, min(high, 119)]

    pages = []
    for position in range(0, 3 * count, 3):
        truth = [
            thing(int(random.integers(2)), box(), int(random.random() < 0.15)) for _ in range(random.integers(0, 6))
        ]
        finds = [found(int(random.integers(3)), box(), float(random.random())) for _ in range(random.integers(0, 5))]
        for real in truth:  # some near, some doubled, a few in another class
            for _ in range(int(random.integers(0, 3))):
                label = real["category_id"] if random.random() < 0.9 else 2
                near = np.array(real["bbox"]) + random.normal(0, 3, 4)
                finds.append(found(label, [*near[:2], *near[2:].clip(2)], round(float(random.random()), 1)))
        pages.append(page(position, truth, sorted(finds, key=lambda f: -f["score"])))
    return pages


def by_pycocotools(pages, masks):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": p.position, "height": p.height, "width": p.width} for p in pages],
            "categories": [{"id": i, "name": name} for i, name in enumerate(NAMES)],
            "annotations": [
                copy.deepcopy(t) | {"image_id": p.position, "id": 10 * p.position + i + 1}
                for p in pages
                for i, t in enumerate(p.truth)
            ],
        }
        truth.createIndex()
        key = "segmentation" if masks else "bbox"
        finds = [
            {k: copy.deepcopy(f[k]) for k in ("category_id", "score", key)} | {"image_id": p.position}
            for p in pages
            for f in p.found
        ]
        evaluator = COCOeval(truth, truth.loadRes(finds), "segm" if masks else "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_numbers_are_those_of_pycocotools(seed, masks):
    pages = random_pages(seed)
    theirs, ours = by_pycocotools(pages, masks), evaluate(pages, NAMES, masks)
    assert 0.05 < ours.numbers["ap"] < 0.95
    expected = {name: theirs.stats[place] for name, place in NUMBERS.items() if theirs.stats[place] >= 0}
    assert ours.numbers == pytest.approx(expected, abs=1e-9)
    for place, own in enumerate(ours.classes):
        precision = theirs.eval["precision"][:, :, place, 0, -1]
        there = precision > -1
        assert own == (pytest.approx(precision[there].mean(), abs=1e-9) if there.any() else None)


@pytest.mark.parametrize("masks", [False, True])
def test_a_perfect_predictor_scores_one_and_an_empty_one_nothing(masks):
    pages = [*random_pages(7), page(90, [thing(0, [0, 0, 159, 119])], [])]
    best = evaluate(perfect(copy.deepcopy(pages)), NAMES, masks)
    assert set(best.numbers) == set(NUMBERS)
    assert all(value == pytest.approx(1) for value in best.numbers.values())
    assert best.classes == [pytest.approx(1), pytest.approx(1), None]  # no hen anywhere
    for one in pages:
        one.found = []
    worst = evaluate(pages, NAMES, masks)
    assert set(worst.numbers.values()) == {0.0}
    assert worst.classes == [0, 0, None]


def test_one_thing_found_of_two_by_hand():
    pages = [page(4, [thing(0, [10, 10, 40, 40]), thing(0, [90, 50, 40, 40])], [found(0, [10, 10, 40, 40], 0.8)])]
    numbers = evaluate(pages, NAMES, masks=False).numbers
    assert numbers["ap"] == pytest.approx(51 / 101)  # precision 1 at recalls 0, 0.01, ..., 0.5
    assert numbers["ar100"] == pytest.approx(0.5)
    assert "ap_small" not in numbers  # there is nothing small to find
    pages[0].found = [found(0, [10, 10, 40, 30], 0.8)]  # an IoU of 0.75
    numbers = evaluate(pages, NAMES, masks=False).numbers
    assert numbers["ap75"] == numbers["ap50"] == pytest.approx(51 / 101)
    assert numbers["ap"] == pytest.approx(6 / 10 * 51 / 101)


def test_what_is_found_in_a_crowd_is_neither_right_nor_wrong():
    crowd, one = thing(1, [80, 10, 70, 100], crowd=1), thing(1, [5, 5, 40, 40])
    pages = [page(0, [crowd, one], [found(1, [90, 30, 20, 20], 0.9), found(1, [5, 5, 40, 40], 0.5)])]
    assert evaluate(pages, NAMES, masks=False).numbers["ap"] == pytest.approx(1)
    pages[0].truth[0]["iscrowd"] = 0
    assert evaluate(pages, NAMES, masks=False).numbers["ap"] < 0.5


def test_the_report_shows_classes_and_examples():
    pages = perfect(random_pages(3))
    boxes, masks = (evaluate(pages, NAMES, which) for which in (False, True))
    details = details_of(pages, NAMES, boxes, masks)
    assert [one["name"] for one in details["classes"]] == NAMES
    assert sum(one["instances"] for one in details["classes"]) == sum(len(p.found) for p in pages)
    assert details["classes"][0]["mask_ap"] == pytest.approx(1)
    assert details["classes"][2]["box_ap"] is None
    assert len(details["examples"]) == 6
    assert details["examples"][0]["position"] == pages[0].position


def test_masks_of_the_report_number_the_things_found():
    finds = [found(0, [10, 10, 40, 40], 0.9), found(1, [90, 30, 50, 60], 0.6), found(1, [0, 0, 9, 9], 0.1)]
    pages = [page(0, [], finds)]
    pages[0].truth = [thing(0, [10, 10, 40, 40])]
    details = details_of(pages, NAMES, evaluate(pages, NAMES, False), None)
    example = details["examples"][0]
    assert [one["score"] for one in example["predicted"]] == [0.9, 0.6]
    assert example["predicted"][0]["box"] == [10, 10, 50, 50]
    assert example["truth"] == [{"box": [10, 10, 50, 50], "label": 0}]
    picture = np.array(Image.open(io.BytesIO(base64.b64decode(example["predicted_mask"]))))
    assert picture.dtype == np.uint8
    assert picture.shape == (120, 160)
    assert (picture == 1).sum() == decoded(finds[0]["segmentation"]).sum()
    assert picture[60, 115] == 2
    assert details["classes"][0]["mask_ap"] is None


def test_where_nothing_is_sure_the_report_shows_the_best():
    pages = [page(0, [thing(0, [10, 10, 40, 40])], [found(0, [i, i, 20, 20], 0.2 - i / 100) for i in range(1, 15)])]
    shown = details_of(pages, NAMES, evaluate(pages, NAMES, False), None)["examples"][0]["predicted"]
    assert [one["score"] for one in shown] == pytest.approx([0.2 - i / 100 for i in range(1, 11)])
