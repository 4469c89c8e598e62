"""What tasks keep for the report, made by hand from generated scenes: the truth, and a prediction with known faults."""

import base64
import io
import math

import numpy as np
from PIL import Image

from harmony.data.sources import open_source

CARD = {
    "resolution": "96 px, the whole image",
    "split": "learned from scenes:train, measured on scenes:val",
    "selection": "none",
    "optimiser": "AdamW, lr 1e-3",
    "schedule": "10 epochs, cosine",
    "differs": "fewer epochs than the papers, which have more data",
}


def png(values) -> str:
    stream = io.BytesIO()
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode("ascii")


def about(uri):
    return {"model": "runs/tiny (teacher)", "data": uri, "train": "scenes:train?count=64", "card": CARD}


def segmentation(uri, count=3):
    """The prediction is the truth two pixels to the right; the last example has a stripe without a class."""
    source = open_source(uri)
    examples = []
    for place in range(count):
        truth = np.array(source[place].mask)
        predicted = np.roll(truth, 2, axis=1)
        if place == count - 1:
            truth[:4] = 255
        height, width = truth.shape
        one = {"position": place, "height": height, "width": width, "truth": png(truth), "predicted": png(predicted)}
        examples.append(one)
    names = source.mask_names
    classes = [
        {"name": name, "pixels": 0, "iou": None, "accuracy": None}
        if place % 5 == 4
        else {"name": name, "pixels": 900, "iou": 1 - place / len(names), "accuracy": 1 - place / len(names) / 2}
        for place, name in enumerate(names)
    ]
    curve = [[step, 3 * math.exp(-step / 60) + 0.1] for step in range(0, 200, 5)]
    return about(uri) | {"classes": classes, "names": names, "examples": examples, "curve": curve}


def detection(uri, count=3, masks=True):
    """Everything is found with a score of 0.9, a little too small; one more box of no sure thing is in each image."""
    source = open_source(uri)
    examples = []
    for place in range(count):
        objects = source[place].objects
        side = source.settings.size
        mask = np.zeros((side, side), dtype=np.uint8)
        predicted, truth = [], []
        for index, (box, label) in enumerate(zip(objects.boxes.tolist(), objects.labels.tolist(), strict=True)):
            truth.append({"box": box, "label": label})
            left, top, right, bottom = box
            predicted.append({"box": [left + 1, top + 1, right - 1, bottom - 1], "label": label, "score": 0.9})
            mask[objects.masks()[index]] = index + 1
        predicted.append({"box": [0, 0, 9, 9], "label": 0, "score": 0.1})
        example = {"position": place, "width": side, "height": side, "predicted": predicted, "truth": truth}
        examples.append(example | {"predicted_mask": png(mask) if masks else None})
    names = source.object_names
    classes = [
        {
            "name": name,
            "instances": 5,
            "box_ap": place / len(names),
            "mask_ap": place / len(names) / 2 if masks else None,
        }
        for place, name in enumerate(names)
    ]
    return about(uri) | {"classes": classes, "names": names, "examples": examples}


def classification(names, images=10):
    """Each class is taken for the next one as often as its place says."""
    wrong = [min(place, images) for place in range(len(names))]
    confusion = np.diag([images - count for count in wrong])
    for place, count in enumerate(wrong):
        confusion[place, (place + 1) % len(names)] += count
    classes = [
        {"name": name, "images": images, "top1": 1 - count / images} for name, count in zip(names, wrong, strict=True)
    ]
    return {"classes": classes, "confusion": confusion.tolist()}


def linear(uri, names):
    """A grid of two blocks, two poolings and seven regularisations; one of them is chosen."""
    strengths = [10.0**power for power in range(-6, 1)]
    grid = [
        {
            "layers": layers,
            "pooling": pooling,
            "regularisation": strength,
            "validation_top1": 0.5 + 0.02 * layers + 0.05 * (pooling == "cls") - 0.01 * abs(place - 3),
            "chosen": layers == 4 and pooling == "cls" and place == 3,
        }
        for layers in (1, 4)
        for pooling in ("cls", "cls_patches")
        for place, strength in enumerate(strengths)
    ]
    return about(uri) | classification(names) | {"grid": grid}
