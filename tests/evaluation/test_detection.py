"""The task as a whole, on generated scenes."""

from dataclasses import replace

import numpy as np
import plain_metrics as plain
import pytest
import torch
from runs_for_evaluation import saved_run, tiny_recipe
from safetensors.torch import load_file

from harmony.data.sources import Source, open_source
from harmony.data.sources.base import BadExample
from harmony.errors import UserError
from harmony.evaluation import detection, fitting
from harmony.evaluation.encoders import load_encoder
from harmony.evaluation.settings import EvaluationConfig
from harmony.evaluation.task import Setup
from harmony.training.signals import Interrupted

QUICK = {
    "train_batch_size": 6,
    "channels": 16,
    "regions": 32,
    "proposals": 30,
    "lr": 3e-3,
    "scale": (0.9, 1.1),
    "drop_path": 0.0,
    "layer_decay": 1.0,
    "anchors": (0.125, 0.1875, 0.25, 0.375, 0.5),
}


class Things(Source):
    """Generated scenes whose things are all of one class, so that finding them is learned in seconds."""

    def __init__(self, split="train", count=64, with_masks=True, change=lambda things: things):
        self.scenes = open_source(f"scenes:{split}?count={count}")
        self.uri = f"things:{split}"
        self.object_names = ["thing"]
        self.has_object_masks = with_masks
        self.change = change

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, i):
        example = self.scenes[i]
        things = replace(example.objects, labels=np.zeros_like(example.objects.labels))
        if not self.has_object_masks:
            things = replace(things, masks=None)
        return replace(example, objects=self.change(things))

    def key(self, i):
        return self.scenes.key(i)

    def fingerprint(self):
        return self.scenes.fingerprint() + self.uri


class Misplaced(Things):
    """Each image with the boxes of another one: what is true of all images together is still there to be learned."""

    def __getitem__(self, i):
        other = super().__getitem__((7 * i + 3) % len(self))
        return replace(super().__getitem__(i), objects=other.objects)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    saved_run(folder, tiny_recipe("model.image.width=32", "views.global.size=64"))
    return load_encoder(str(folder), "teacher", "cpu")


def setup(encoder, data=None, train=None, work=None, **settings):
    config = EvaluationConfig(workers=0, batch_size=8, size=64, detection=QUICK | settings)
    return Setup(encoder, data or Things("val", 8), train or Things(), config, work)


def test_it_learns_where_things_are_and_from_boxes_of_other_images_does_not(encoder):
    data = Things("val", 32, with_masks=False)
    found = [
        detection.run(setup(encoder, data, train, steps=400)).metrics
        for train in (Things(count=192, with_masks=False), Misplaced(count=192, with_masks=False))
    ]
    assert found[0]["box_ap50"] > 0.4
    assert found[1]["box_ap50"] < 0.2  # what boxes at the usual places and sizes score by chance
    assert found[0]["box_ap75"] > 2 * found[1]["box_ap75"]


def test_training_is_better_than_none_in_boxes_and_masks(encoder, tmp_path):
    data = Things("val", 16)
    untrained = detection.run(setup(encoder, data, steps=1, lr=1e-9)).metrics
    learned = setup(encoder, data, work=tmp_path, steps=100)
    outcome = detection.run(learned)
    assert untrained["box_ap50"] < 0.02
    assert outcome.metrics["box_ap50"] > untrained["box_ap50"] + 0.05
    assert outcome.metrics["mask_ap50"] > untrained["mask_ap50"] + 0.05
    assert outcome.metrics["images"] == 16
    assert outcome.metrics["things"] == sum(one["instances"] for one in outcome.details["classes"])
    weights = load_file(tmp_path / "model.safetensors")
    assert set(weights) == set(detection.build(learned).state_dict())
    shown = outcome.details["examples"]
    assert len(shown) == 6
    assert any(one["predicted_mask"] for one in shown)


def test_boxes_alone_need_no_masks(encoder):
    boxes = Things("val", 8, with_masks=False)
    one = setup(encoder, boxes, steps=2)
    outcome = detection.run(one)
    assert {"box_ap", "box_ap50", "box_ar100"} <= set(outcome.metrics)
    assert not [name for name in outcome.metrics if name.startswith("mask")]
    assert all(example["predicted_mask"] is None for example in outcome.details["examples"])
    assert "boxes alone" in detection.card(one).selection
    assert detection.build(setup(encoder, train=Things(with_masks=False))).masks is None


def test_a_cascade_runs(encoder):
    outcome = detection.run(setup(encoder, steps=2, head="cascade", window=3, train_batch_size=2))
    assert {"box_ap", "mask_ap"} <= set(outcome.metrics)
    assert len(detection.build(setup(encoder, head="cascade")).boxes.heads) == 3


def test_an_interrupted_training_goes_on_to_the_same_weights(encoder, tmp_path, monkeypatch):
    settings = {"steps": 4, "train_batch_size": 2}
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    expected = detection.run(setup(encoder, work=whole, **settings))

    class Stop(fitting.Signals):
        asked = 0

        def anywhere(self):
            Stop.asked += 1
            return 15 if Stop.asked == 2 else None

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "Signals", Stop)
        with pytest.raises(Interrupted):
            detection.run(setup(encoder, work=parted, **settings))
    assert (parted / "fit.pt").is_file()
    assert not (parted / "model.safetensors").exists()
    outcome = detection.run(setup(encoder, work=parted, **settings))
    assert outcome.metrics == expected.metrics
    first, second = (load_file(work / "model.safetensors") for work in (whole, parted))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_layers_near_the_image_learn_more_slowly(encoder):
    detector = detection.build(setup(encoder))
    groups = detection.groups(detector, detection.DetectionConfig(layer_decay=0.5))
    rates = {id(p): (group.lr_scale, group.decays) for group in groups for p in group.parameters}
    trunk = detector.trunk.model
    assert len(rates) == sum(1 for _ in detector.parameters())
    assert rates[id(trunk.patch_embed.proj.weight)] == (0.125, True)
    assert rates[id(trunk.pos_embed)] == (0.125, False)
    assert rates[id(trunk.blocks[0].attn.qkv.weight)] == (0.25, True)
    assert rates[id(trunk.blocks[1].norm1.weight)] == (0.5, False)
    assert rates[id(detector.boxes.heads[0].classify.weight)] == (1, True)
    assert rates[id(detector.boxes.heads[0].classify.bias)] == (1, False)


def nothing(things):
    return replace(things, boxes=things.boxes[:0], labels=things.labels[:0], crowd=things.crowd[:0], masks=None)


def crowds(things):
    return replace(things, crowd=np.ones_like(things.crowd))


@pytest.mark.parametrize("change", [nothing, crowds])
def test_data_without_a_thing_are_refused_before_training(encoder, change, tmp_path):
    for given in ({"data": Things("val", 4, change=change)}, {"train": Things("train", 4, change=change)}):
        with pytest.raises(UserError, match=r"no image of things:\w+ has a box around a thing"):
            detection.run(setup(encoder, work=tmp_path, **given))
    assert list(tmp_path.iterdir()) == []


def renamed():
    source = Things()
    source.object_names = ["cell"]
    return source


def test_what_does_not_fit_is_said_in_one_sentence(encoder):
    assert detection.missing(setup(encoder)) is None
    assert "needs boxes, and colours: has none" in detection.missing(setup(encoder, plain.Colours([0, 1])))
    assert "needs boxes to learn from" in detection.missing(setup(encoder, train=plain.Colours([0, 1])))
    assert "(cell) and of things:val (thing) differ" in detection.missing(setup(encoder, train=renamed()))
    same = Things()
    assert "would be measured on what it learned from, things:train" in detection.missing(setup(encoder, same, same))
    one = setup(encoder)
    one.data = one.train
    assert "measured on what it learned from" in detection.missing(one)
    one = setup(encoder)
    one.train = None
    assert "--train-data" in detection.missing(one)
    one = setup(encoder)
    one.config = one.config.model_copy(update={"size": 60})
    assert "60 is not a multiple of the patch size 8; set it to 56 or 64" in detection.missing(one)


def test_images_that_cannot_be_read_are_counted(encoder):
    class Torn(Things):
        def __getitem__(self, i):
            if i == 2:
                raise BadExample(self.key(i), "is truncated (test)")
            return super().__getitem__(i)

    metrics = detection.run(setup(encoder, Torn("val", 4), Torn("train", 4), steps=1)).metrics
    assert metrics["bad_examples"] == 1
    assert metrics["images"] == 3


def test_the_card_says_what_was_done(encoder):
    rows = detection.card(setup(encoder, steps=50, head="cascade")).rows()
    assert "64 px" in rows["resolution"]
    assert "windows of 14" in rows["resolution"]
    assert "things:train" in rows["split"] and "things:val" in rows["split"]
    assert "Cascade" in rows["selection"]
    assert "50 steps" in rows["schedule"]
