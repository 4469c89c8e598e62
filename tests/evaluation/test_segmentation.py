import base64
import io
import os
import signal

import numpy as np
import plain_metrics as plain
import pytest
import torch
from PIL import Image
from runs_for_evaluation import saved_run, tiny_recipe
from safetensors.torch import load_file
from segmentation_parts import Broken, Kept, PatchColours, camvid, config, scenes, shuffled, squares

from harmony.data.sources import Example
from harmony.errors import UserError
from harmony.evaluation import segmentation, tasks
from harmony.evaluation.encoder import Encoding
from harmony.evaluation.encoders import load_encoder
from harmony.evaluation.segmentation.heads import Segmenter
from harmony.evaluation.segmentation.measure import measure
from harmony.evaluation.task import Setup
from harmony.training.signals import Interrupted

SCORES = ("miou", "mean_accuracy", "pixel_accuracy")


@pytest.fixture(scope="module")
def train():
    return scenes("train", 48)


@pytest.fixture(scope="module")
def data():
    return scenes("val", 16)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return saved_run(tmp_path_factory.mktemp("run") / "run", tiny_recipe()).folder


def measured(encoder, data, train=None, work=None, **settings):
    setup = Setup(encoder, data, train, config(**settings), work)
    assert segmentation.missing(setup) is None
    return segmentation.run(setup)


@pytest.mark.parametrize("head", ["linear", "multi_linear"])
def test_a_head_on_an_encoder_that_sees_colours_learns(train, data, head):
    found = measured(PatchColours(), data, train, head=head, steps=25).metrics
    assert found["miou"] > 2 * found["chance_miou"]
    assert found["mean_accuracy"] > 2 * found["chance_mean_accuracy"]
    assert found["pixel_accuracy"] > found["chance_pixel_accuracy"]
    assert (found["train_images"], found["images"], found["bad_examples"]) == (48, 16, 0)


def test_a_head_on_a_blind_encoder_does_not_learn(train, data):
    blind = measured(PatchColours(blind=True), data, train, steps=12).metrics
    # It can only say how frequent classes are.
    assert {name: blind[name] for name in SCORES} == pytest.approx({n: blind[f"chance_{n}"] for n in SCORES}, abs=0.02)


def test_masks_of_other_images_teach_nothing(train, data):
    found = measured(PatchColours(), data, shuffled(train), steps=50, most_of_one_class=1.0).metrics
    assert found["miou"] == pytest.approx(found["chance_miou"], abs=0.02)
    assert found["mean_accuracy"] == pytest.approx(found["chance_mean_accuracy"], abs=0.02)


def test_upernet_learns_and_trains_the_encoder(run_dir, tmp_path):
    encoder = load_encoder(str(run_dir))
    data = squares(12, 32, 32, seed=1)
    before = encoder.fingerprint()
    outcome = measured(
        encoder, data, squares(32, 32, 32), tmp_path, head="upernet", steps=14, lr=0.01, backbone_lr_scale=1.0
    )
    assert outcome.metrics["miou"] > 3 * outcome.metrics["chance_miou"]
    assert encoder.fingerprint() == before  # the copy was trained
    weights = load_file(tmp_path / "model.safetensors")
    untrained = encoder.backbone(32).state_dict()
    assert not torch.equal(weights["backbone.blocks.0.attn.qkv.weight"], untrained["blocks.0.attn.qkv.weight"])
    assert {"fuse.0.weight", "classify.1.weight", "auxiliary.0.0.weight"} <= weights.keys()
    assert (tmp_path / "fit.pt").exists()  # until the results are written


class Oracle(Segmenter):
    """Knows the palette, pixel by pixel; or is always wrong."""

    def __init__(self, encoder, wrong=0):
        super().__init__()
        self.encoder, self.wrong = encoder, wrong

    def forward(self, pixels):
        colours = self.encoder.denormalise(pixels).float().movedim(1, -1)
        nearest = torch.cdist(colours.flatten(0, 2), torch.tensor(plain.PALETTE).float()).argmin(1)
        one_hot = torch.eye(7)[(nearest + self.wrong) % 7]
        return one_hot.view(*colours.shape[:3], 7).movedim(-1, 1)


def test_the_order_of_scales_does_not_matter():
    encoder, data = PatchColours(), squares(7)
    counts = [
        measure(Oracle(encoder), Setup(encoder, data, None, config(short_side=None, test_scales=scales))).confusion
        for scales in ((1.0, 0.25), (0.25, 1.0))
    ]
    assert torch.equal(counts[0].counts, counts[1].counts)


@pytest.mark.parametrize("changes", [{}, {"test_scales": (1.0, 2.0), "test_flip": True}])
def test_a_perfect_predictor_scores_one_and_a_wrong_one_nothing(changes):
    encoder, data = PatchColours(), squares(7)
    setup = Setup(encoder, data, None, config(short_side=None, **changes))
    perfect = measure(Oracle(encoder), setup).confusion
    if changes:  # the rims of what was enlarged are blurred
        assert min(perfect.scores().values()) > 0.97
    else:
        assert set(perfect.scores().values()) == {1.0}
    assert perfect.ignored == 7 * 2 * 56
    assert int(perfect.counts.sum()) == 7 * 38 * 56
    assert max(measure(Oracle(encoder, wrong=1), setup).confusion.scores().values()) < 0.02


def test_chance_is_the_score_of_the_class_that_training_shows_most(train, data):
    found = measured(PatchColours(blind=True), data, train, steps=1).metrics
    masks = np.stack([example.mask for example in data.examples])
    assert np.bincount(np.stack([example.mask for example in train.examples]).ravel()).argmax() == 0
    share = float((masks == 0).mean())
    present = len(np.unique(masks))
    assert found["chance_pixel_accuracy"] == pytest.approx(share)
    assert found["chance_miou"] == pytest.approx(share / present)
    assert found["chance_mean_accuracy"] == pytest.approx(1 / present)


def test_patches_are_compared_with_the_names_of_classes():
    found = measured(PatchColours(), squares(8, 48, 48), head="zero_shot").metrics
    assert found["miou"] > 0.6 > 5 * found["chance_miou"]  # the rims of patches are coarse


def test_zero_shot_on_towers_is_what_is_found_by_hand(run_dir):
    encoder = load_encoder(str(run_dir))
    segmenter, groups = segmentation.build(Setup(encoder, squares(1), None, config(head="zero_shot")))
    assert groups == []
    pixels = torch.randn(1, 3, 32, 32)
    patch = encoder.encode(pixels, 1).layers[-1].patches[0, :, 2, 1]
    own = plain.unit(encoder.towers.image.proj(patch))
    from harmony.evaluation.templates import load_templates, prompts

    names = [
        plain.unit(sum(plain.unit(encoder.texts([text])[0]) for text in prompts(name, load_templates("plain"))))
        for name in plain.NAMES
    ]
    expected = [plain.similarity(own, name) for name in names]
    assert segmenter(pixels)[0, :, 2, 1].tolist() == pytest.approx(expected, abs=1e-5)


def test_an_interrupted_training_goes_on_to_the_same_end(train, data, tmp_path, capsys):
    few = Kept(train.examples[:24], train.mask_names)
    whole = measured(PatchColours(), data, few, tmp_path / "whole", steps=12)
    read = 0

    def stop(_: int) -> None:
        nonlocal read
        read += 1
        if read == 24 + 5 * 8:  # all were read once to count their classes; this is within the fifth batch
            os.kill(os.getpid(), signal.SIGTERM)

    few.reading = stop
    with pytest.raises(Interrupted):
        measured(PatchColours(), data, few, tmp_path / "two", steps=12)
    assert (tmp_path / "two" / "fit.pt").exists()
    assert not (tmp_path / "two" / "model.safetensors").exists()
    resumed = measured(PatchColours(), data, few, tmp_path / "two", steps=12)
    assert "Going on from step 5" in capsys.readouterr().err
    assert resumed.metrics == whole.metrics
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "two"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_what_the_report_is_given(train, data):
    source = Kept(data.examples[:10], data.mask_names)
    details = measured(PatchColours(), source, train, steps=3).details
    assert details["names"] == train.mask_names
    assert [row["name"] for row in details["classes"]] == train.mask_names
    assert sum(row["pixels"] for row in details["classes"]) == 10 * 48 * 48
    assert [one["position"] for one in details["examples"]] == [0, 1, 3, 5, 6, 8]
    for one in details["examples"]:
        truth, predicted = (
            np.array(Image.open(io.BytesIO(base64.b64decode(one[name])))) for name in ("truth", "predicted")
        )
        assert np.array_equal(truth, source.examples[one["position"]].mask)
        assert truth.shape == predicted.shape == (one["height"], one["width"])
        assert predicted.max() < 9


def test_masks_for_the_report_are_small_and_say_what_has_no_class():
    truth = torch.zeros(300, 600, dtype=torch.int32)
    truth[:, 300:] = -1
    from harmony.evaluation.segmentation.measure import example

    about = example(4, truth, torch.ones_like(truth))
    picture = np.array(Image.open(io.BytesIO(base64.b64decode(about["truth"]))))
    assert (about["height"], about["width"], picture.shape) == (300, 600, (128, 256))
    assert set(np.unique(picture)) == {0, 255}
    assert "truth" not in example(4, truth + 255, truth)  # more classes than 8 bits hold


def test_what_cannot_be_measured_is_left_out_and_counted(train, data, capsys):
    source = Kept(data.examples[:4], data.mask_names)
    good = measured(PatchColours(), source, train, steps=1).metrics
    odd = np.full((48, 48), 9, dtype=np.uint8)
    source = Kept([*source.examples, Example("odd", data.examples[0].image, mask=odd)], data.mask_names)
    found = measured(PatchColours(), source, train, steps=1).metrics
    assert found.pop("bad_examples") == 1
    assert found == {name: value for name, value in good.items() if name != "bad_examples"}
    assert "odd has a mask with the value 9, which is neither one of the classes 0 .. 8 nor 255" in " ".join(
        capsys.readouterr().err.split()
    )
    with pytest.raises(UserError, match="no example of kept: can be used: broken-0"):
        measured(PatchColours(), Broken(source.examples, source.mask_names), train, steps=1)
    nothing = Kept([Example("a", data.examples[0].image, mask=odd * 0 + 255)], data.mask_names)
    with pytest.raises(UserError, match="no pixel of kept: belongs to a class"):
        measured(PatchColours(), nothing, train, steps=1)
    assert "training" not in capsys.readouterr().err.partition("odd has a mask")[2]  # said before, not after


def test_only_as_many_images_as_asked_for_are_measured(train, data):
    setup = Setup(PatchColours(), data, train, config(steps=1).model_copy(update={"max_examples": 5}))
    assert segmentation.run(setup).metrics["images"] == 5


class Flat(PatchColours):
    """One vector for the whole image."""

    def encode(self, pixels, layers=0):
        encoding = super().encode(pixels, layers)
        for layer in encoding.layers:
            object.__setattr__(layer, "patches", layer.patches.mean(dim=(2, 3), keepdim=True))
        return encoding


class Mapless(PatchColours):
    def encode(self, pixels, layers=0):
        return Encoding(super().encode(pixels, 0).embedding)


class Damaged(PatchColours):
    def shared(self, patches):
        return super().shared(patches) * torch.nan


def test_what_does_not_fit_is_said_in_one_sentence(train, data):
    encoder = PatchColours()

    def why(data, train=train, encoder=encoder, size=None, **settings):
        wanted = config(**settings).model_copy(update={"size": size})
        return segmentation.missing(Setup(encoder, data, train, wanted))

    maskless = Kept(data.examples, None, "pictures:")
    assert why(data) is None
    assert "needs a mask for each image, and pictures: has none" in why(maskless)
    assert "--train-data" in why(data, train=None)
    assert "learns from masks, and pictures: has none" in why(data, train=maskless)
    assert "size 50 is not a multiple of the patch size 4; set it to 48 or 52" in why(data, size=50)
    assert "size 2 is not a multiple of the patch size 4; set it to 4" in why(data, size=2)
    other = Kept(data.examples, ["ground", "sky"], "other:")
    assert "the classes of scenes:train" in why(other)
    assert "(ground, red, orange, yellow, green, ... 9 in all) are not those of other: (ground, sky)" in why(other)
    ground = Kept(data.examples, ["ground"], "ground:")
    assert "ground: has one class, 'ground'" in why(ground, train=ground)
    assert "measured on what it learned from, scenes:" in why(data, train=data)
    blind_to_words = PatchColours()
    blind_to_words.reads_text = False
    assert "needs a text tower" in why(data, encoder=blind_to_words, head="zero_shot")
    assert why(data, train=None, head="zero_shot") is None


@pytest.mark.parametrize(
    ("encoder", "settings", "message"),
    [
        (Flat(), {}, "one vector for a whole image"),
        (Mapless(), {}, "needs patch maps, and patch colours gives none"),
        (PatchColours(), {"head": "upernet"}, "is no timm model"),
    ],
)
def test_encoders_that_do_not_suit_are_refused(train, data, encoder, settings, message):
    with pytest.raises(UserError, match=message):
        segmentation.run(Setup(encoder, data, train, config(**settings)))


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="scores of some pixels are not finite"):
        segmentation.run(Setup(Damaged(), squares(2), None, config(head="zero_shot")))


def test_what_upernet_and_zero_shot_cannot_do_is_said(run_dir, train, data):
    encoder = load_encoder(str(run_dir))
    with pytest.raises(UserError, match="at least two crops a process, and a batch has 1"):
        segmentation.run(Setup(encoder, data, train, config(head="upernet", train_batch_size=1)))
    twins = Kept(data.examples, ["a", "a", *"bcdefgh"])
    with pytest.raises(UserError, match="'a' stands for several classes"):
        segmentation.run(Setup(encoder, twins, None, config(head="zero_shot")))
    patchless = plain.ColourEncoder()
    with pytest.raises(UserError, match="cannot put patches into the space it shares with texts"):
        segmentation.run(Setup(patchless, squares(2), None, config(head="zero_shot").model_copy(update={"size": 16})))


def test_from_the_command_to_files(run_dir, tmp_path):
    settings = {"workers": 0, "steps": 2, "train_batch_size": 4, "head": "multi_linear", "size": 48}
    uri = "scenes:{}?things=colour&size=48&count=6"
    outcome = tasks.run(
        str(run_dir), "segmentation", uri.format("val"), uri.format("train"), settings=settings, out=tmp_path / "out"
    )
    assert {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()} == {
        "metrics.json",
        "segmentation.json",
        "model.safetensors",
    }
    assert "windows of 48 px" in outcome.details["card"]["resolution"]
    assert load_file(tmp_path / "out/evaluation/segmentation/model.safetensors")["classify.weight"].shape[1] == 32


def test_a_training_is_not_lost_before_its_results_are_written(run_dir, tmp_path, monkeypatch, capsys):
    settings = {"workers": 0, "steps": 2, "train_batch_size": 4, "size": 48}
    uris = [f"scenes:{split}?things=colour&size=48&count=6" for split in ("val", "train")]

    def stop(*told):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tasks, "write_metrics", stop)
        with pytest.raises(KeyboardInterrupt):
            tasks.run(str(run_dir), "segmentation", *uris, settings=settings, out=tmp_path)
    tasks.run(str(run_dir), "segmentation", *uris, settings=settings, out=tmp_path)
    assert "Going on from step 2" in capsys.readouterr().err
    assert not list(tmp_path.rglob("fit.pt"))


@pytest.mark.parametrize("head", ["linear", "multi_linear", "upernet", "zero_shot"])
def test_every_head_has_a_card(train, data, head):
    setup = Setup(PatchColours(), data, train, config(head=head, short_side=None, test_flip=True))
    rows = segmentation.card(setup).rows()
    assert "images as they are" in rows["resolution"]
    assert "and mirrored" in rows["resolution"]
    assert data.uri in rows["split"]


def test_camvid(run_dir, shared):
    folder = shared / "data/segmentation/camvid"
    train, val = camvid(folder, "train", 16), camvid(folder, "val", 3)
    setup = Setup(load_encoder(str(run_dir)), val, train, config(steps=5, lr=0.01, short_side=48))
    outcome = segmentation.run(setup)
    assert (outcome.metrics["images"], outcome.metrics["bad_examples"], outcome.metrics["train_images"]) == (3, 0, 16)
    assert 0 < outcome.metrics["unlabelled_pixels"] < 0.3
    assert sum(row["pixels"] for row in outcome.details["classes"]) == pytest.approx(
        3 * 320 * 240 * (1 - outcome.metrics["unlabelled_pixels"])
    )
