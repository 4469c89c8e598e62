"""Fine-tuning: layer decay, mixing, shares of labels, and that it learns what there is to learn and nothing else."""

import json
import re
import signal
from copy import copy
from dataclasses import replace
from pathlib import Path

import plain_metrics as plain
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from runs_for_evaluation import saved_run, tiny_recipe
from safetensors.torch import load_file
from torch import nn

from harmony.cli import main
from harmony.data.scenes.words import COLOURS
from harmony.data.sources import Source, open_source
from harmony.errors import UserError
from harmony.evaluation import fine_tune, fine_tune_batches, tasks
from harmony.evaluation.class_labels import Labels, read_labels, share_of
from harmony.evaluation.classification import accuracy
from harmony.evaluation.encoders import load_encoder
from harmony.evaluation.fine_tune_batches import FineTuneBatches, FineTuneLoss, augmentation
from harmony.evaluation.layer_decay import layer_groups
from harmony.evaluation.settings import EvaluationConfig, FineTuneConfig
from harmony.evaluation.task import Setup

PLAIN = {"mixup": 0, "cutmix": 0, "label_smoothing": 0, "randaugment": None, "random_erasing": 0, "drop_path": 0}
"""No augmentation but crops and flips."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return saved_run(tmp_path_factory.mktemp("run"), tiny_recipe())


@pytest.fixture(scope="module")
def encoder(run):
    return load_encoder(str(run.folder))


def setup(encoder, data, train, work=None, size=None, **settings):
    config = EvaluationConfig(workers=0, batch_size=16, size=size, fine_tune=FineTuneConfig(**settings))
    return Setup(encoder, data, train, config, work)


# -- layer decay --------------------------------------------------------------------------------------------------


def layer_of(name, depth):
    """BEiT's and MAE's layer of a ViT's parameter."""
    if name.startswith(("cls_token", "reg_token", "pos_embed", "patch_embed")):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else depth + 1


@pytest.mark.parametrize("changes", [{}, {"reg_tokens": 2, "init_values": 0.1}, {"global_pool": "avg"}])
def test_layers_decay_as_in_beit_and_mae(changes):
    model = timm.create_model(
        "vit_tiny_patch16_224", embed_dim=16, depth=5, num_heads=2, img_size=32, num_classes=3, **changes
    )
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[parameter]: group for group in layer_groups(model, 0.65) for parameter in group.parameters}
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, group in found.items():
        assert group.lr_scale == pytest.approx(0.65 ** (6 - layer_of(name, 5))), name
        decays = name.endswith(".weight") and "norm" not in name  # not biases, norms, scales, tokens, positions
        assert group.decays == decays, name
    factors = {name: group.lr_scale for name, group in found.items()}
    assert factors["head.weight"] == 1
    assert factors["blocks.4.mlp.fc1.weight"] == 0.65
    assert factors["cls_token"] == factors["patch_embed.proj.weight"] == pytest.approx(0.65**6)


def test_no_layer_decay_is_one_rate(encoder):
    assert {group.lr_scale for group in layer_groups(encoder.backbone(32), 1.0)} == {1.0}


def test_other_kinds_of_models_have_layers_too():
    model = timm.create_model("resnet18", num_classes=3)
    factors = {id(p): group.lr_scale for group in layer_groups(model, 0.5) for p in group.parameters}
    assert factors[id(model.fc.weight)] == 1 > factors[id(model.layer4[1].conv1.weight)]
    assert factors[id(model.layer4[0].conv1.weight)] > factors[id(model.layer1[0].conv1.weight)]
    assert factors[id(model.layer1[0].conv1.weight)] > factors[id(model.conv1.weight)]


@pytest.mark.parametrize("name", ["resnet18", "test_vit", "test_convnext", "swin_tiny_patch4_window7_224"])
def test_a_layer_has_its_rate_whether_the_head_is_in_the_model_or_on_it(name):
    def factors(classes):
        model = timm.create_model(name, num_classes=classes)
        scales = {id(p): group.lr_scale for group in layer_groups(model, 0.5) for p in group.parameters}
        return {key: scales[id(parameter)] for key, parameter in model.named_parameters()}

    inside, on = factors(3), factors(0)
    assert on == {key: inside[key] for key in on}


# -- augmentation and mixing --------------------------------------------------------------------------------------


def loss_of(model=None, classes=7, **settings):
    return FineTuneLoss(model or nn.Flatten(), plain.ColourEncoder(), classes, FineTuneConfig(**settings))


def a_batch(count=8):
    torch.manual_seed(0)
    return torch.randint(256, (count, 3, 16, 16), dtype=torch.uint8), torch.arange(count) % 7


@pytest.mark.parametrize("settings", [{}, {"mixup": 0}, {"cutmix": 0}, {"mixed": 0.5}, {"label_smoothing": 0}, PLAIN])
def test_targets_sum_to_one(settings):
    loss = loss_of(**settings)
    for _ in range(5):
        pixels, targets = loss.mixed(a_batch())
        assert pixels.shape == (8, 3, 16, 16)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(8))
        assert targets.min() >= (0.1 / 7 if "label_smoothing" not in settings else 0) - 1e-6


def test_a_mixed_target_says_how_much_of_each_image_is_there():
    batch = a_batch(6)
    clean = plain.ColourEncoder().normalise(batch[0])
    for settings in ({"cutmix": 0}, {"mixup": 0}):
        loss = loss_of(**{**PLAIN, "mixup": 0.8, "cutmix": 1.0} | settings)
        for _ in range(5):
            pixels, targets = loss.mixed(batch)
            share = targets[0, batch[1][0]].item()  # of the first image; the rest is the last one's
            if "cutmix" in settings:
                torch.testing.assert_close(pixels[0], share * clean[0] + (1 - share) * clean[5])
            else:
                assert (pixels[0] == clean[0]).all(dim=0).float().mean().item() == pytest.approx(share)
                assert ((pixels[0] == clean[0]) | (pixels[0] == clean[5])).all()


def test_without_mixing_it_is_cross_entropy_with_smoothed_labels():
    loss = loss_of(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 7)), **PLAIN | {"label_smoothing": 0.2})
    batch = a_batch()
    expected = F.cross_entropy(loss._model(plain.ColourEncoder().normalise(batch[0])), batch[1], label_smoothing=0.2)
    torch.testing.assert_close(loss(batch), expected)


def test_erasing_puts_noise_into_a_rectangle():
    batch = a_batch()
    clean = plain.ColourEncoder().normalise(batch[0])
    pixels, _ = loss_of(**PLAIN | {"random_erasing": 1.0}).mixed(batch)
    changed = (pixels != clean).any(dim=1)
    assert all(0.01 < share < 0.4 for share in changed.float().mean(dim=(1, 2)).tolist())
    rows, columns = changed[0].any(dim=1), changed[0].any(dim=0)
    assert changed[0].sum() == rows.sum() * columns.sum()


def test_augmented_crops():
    image = torch.arange(3 * 40 * 60).view(3, 40, 60).to(torch.uint8)
    crops = [augmentation(24, FineTuneConfig(), (0.5, 0.4, 0.3))(image) for _ in range(10)]
    assert all(crop.shape == (3, 24, 24) and crop.dtype == torch.uint8 for crop in crops)
    assert len({crop.sum().item() for crop in crops}) > 5
    still = FineTuneConfig(**PLAIN | {"crop_scale": (1.0, 1.0), "flip": 1.0})
    square = image[:, :, :40]
    torch.testing.assert_close(augmentation(40, still, (0.5, 0.4, 0.3))(square), square.flip(-1))


def test_a_batch_holds_the_labelled_images_it_says(encoder):
    source = plain.Colours([0, None, 1, 2, None, 3], bad=[3])
    labels = read_labels(source, range(6), plain.NAMES, EvaluationConfig(workers=0), 2**26)
    assert (labels.positions.tolist(), labels.labels.tolist(), labels.unlabelled) == ([0, 2, 5], [0, 1, 3], 2)
    assert labels.bad == [("colour-3", "is truncated (test)")]
    batches = FineTuneBatches(source, labels, 8, FineTuneConfig(**PLAIN, train_batch_size=3), encoder.mean, 2**26)
    pixels, own = batches[0]
    assert sorted(own.tolist()) == [0, 1, 3]
    for crop, label in zip(pixels, own.tolist(), strict=True):
        assert crop[:, 4, 4].tolist() == pytest.approx(plain.PALETTE[label], abs=1)


# -- share of labels ----------------------------------------------------------------------------------------------


def labelled(*counts):
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    return Labels(torch.arange(len(labels)) * 3, labels, 0, [])


def test_a_share_of_the_labels_is_stratified_and_nested():
    everything = labelled(1000, 300, 30, 4, 1)
    shares = {share: share_of(everything, share, seed=0) for share in (0.01, 0.1, 0.5, 1.0)}
    counts = {share: torch.bincount(part.labels).tolist() for share, part in shares.items()}
    assert counts == {
        0.01: [10, 3, 1, 1, 1],
        0.1: [100, 30, 3, 1, 1],
        0.5: [500, 150, 15, 2, 1],
        1.0: [1000, 300, 30, 4, 1],
    }
    places = [set(shares[share].positions.tolist()) for share in sorted(shares)]
    assert places[0] < places[1] < places[2] < places[3]
    by_place = dict(zip(everything.positions.tolist(), everything.labels.tolist(), strict=True))
    small = shares[0.01]
    assert [by_place[place] for place in small.positions.tolist()] == small.labels.tolist()


def test_a_seed_chooses_the_share():
    everything = labelled(200, 200)
    drawn = [share_of(everything, 0.1, seed).positions.tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_share_is_counted_and_told(encoder, capsys):
    source = plain.Colours([0, 1] * 40)
    outcome = fine_tune.run(setup(encoder, source, source, steps=1, labels=0.1, **PLAIN))
    assert outcome.metrics["train_examples"] == 8
    said = capsys.readouterr().err
    assert "Learning from 8 of 80 images, 0 to 4 a class" in said
    assert "5 classes have no training image" in said.replace("\n", " ")
    assert "10 % of the labels" in fine_tune.card(setup(encoder, source, source, labels=0.1)).split


# -- measuring ----------------------------------------------------------------------------------------------------


class Seeing(nn.Module):
    """A classifier that is right, wrong, or sees the same in everything, as its encoder."""

    def __init__(self, encoder):
        super().__init__()
        self.see = encoder.see

    def forward(self, pixels):
        return self.see(pixels)


@pytest.mark.parametrize(
    ("encoder_", "expected"),
    [(plain.ColourEncoder(), 1.0), (plain.ColourEncoder(wrong=True), 0.0), (plain.ConstantEncoder(), 0.0)],
)
def test_a_perfect_classifier_is_always_right_and_others_never(encoder_, expected):
    data = plain.Colours([0, 1, 2, None, 3, 4, 5, 6, 6], bad=[2])
    read, ranks, predicted = fine_tune.evaluate(Seeing(encoder_), setup(encoder_, data, data), range(9))
    assert read.labels == [0, 1, 3, 4, 5, 6, 6]
    assert read.bad == [("colour-2", "is truncated (test)")]
    metrics = accuracy(ranks, torch.tensor(read.labels), 7)
    assert metrics["top1"] == metrics["mean_per_class"] == expected
    assert (predicted == torch.tensor(read.labels)).float().mean() == expected


# -- learning -----------------------------------------------------------------------------------------------------


class Relabelled(Source):
    """Scenes, kept in memory, whose class is the colour of the main thing."""

    def __init__(self, split, count):
        scenes = open_source(f"scenes:{split}?count={count * 3}&size=32")
        colours = len(COLOURS)
        kept = [example for example in map(scenes.__getitem__, range(len(scenes))) if example.label % colours < 4]
        self.examples = [replace(example, label=example.label % colours) for example in kept]
        self.uri, self.class_names = f"colours of {scenes.uri}", list(COLOURS)[:4]

    def shuffled(self):
        """The same scenes, each with the label of another."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(3)).tolist()
        other = copy(self)
        other.examples = [replace(e, label=self[i].label) for e, i in zip(self.examples, order, strict=True)]
        return other

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        return self.examples[i]

    def key(self, i):
        return self.examples[i].key

    def fingerprint(self):
        return self.uri


SHORT = {"steps": 200, "train_batch_size": 32, "lr": 1e-2, "layer_decay": 1, "crop_scale": (0.6, 1.0), **PLAIN}


def test_it_learns_what_is_there_and_random_labels_score_chance(encoder):
    data = Relabelled("val", 80)
    train, found = Relabelled("train", 150), {}
    for shuffled in (False, True):
        outcome = fine_tune.run(setup(encoder, data, train.shuffled() if shuffled else train, **SHORT))
        found[shuffled] = outcome.metrics
        assert outcome.metrics["chance_top1"] == 0.25
    assert found[False]["top1"] > 0.9
    assert abs(found[True]["top1"] - 0.25) < 0.12
    assert len(outcome.details["curve"]) == 200
    assert sum(map(sum, outcome.details["confusion"])) == found[True]["examples"] == len(data)


def test_it_learns_from_mixed_pictures(encoder):
    """With every augmentation on, flat colours are told apart."""
    source = plain.Colours([i % 7 for i in range(56)])
    outcome = fine_tune.run(setup(encoder, source, source, steps=120, train_batch_size=28, lr=1e-2, layer_decay=1))
    assert outcome.metrics["top1"] > 0.9
    assert outcome.metrics["top5"] == 1


# -- from the command line: interruption, weights, results --------------------------------------------------------


def command(run, out, *settings):
    given = ["steps=6", "train_batch_size=8", "ema=0.5", "workers=0", "size=48", *settings]
    return main(
        ["evaluate", str(run.folder), "--task", "fine_tune", "--data", "scenes:val?count=12&size=32", "--train-data",
         "scenes:train?count=24&size=32", "--out", str(out), *(part for one in given for part in ("--set", one))]
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert command(run, out) == 0
    return out


def test_an_interrupted_command_goes_on_to_the_same_bits(run, whole, tmp_path, monkeypatch, capsys):
    make, calls = fine_tune_batches.FineTuneBatches.make, []

    def interrupted(self, positions):
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return make(self, positions)

    monkeypatch.setattr(fine_tune_batches.FineTuneBatches, "make", interrupted)
    assert command(run, tmp_path) == 130
    work = tmp_path / "evaluation" / "fine_tune"
    assert [path.name for path in work.iterdir()] == ["fit.pt"]
    assert not (tmp_path / "metrics.json").exists()
    monkeypatch.undo()
    assert command(run, tmp_path) == 0
    assert "Going on from step 4" in capsys.readouterr().err
    assert sorted(path.name for path in work.iterdir()) == ["config.json", "model.safetensors"]
    for file in ("metrics.json", "evaluation/fine_tune.json", "evaluation/fine_tune/model.safetensors"):
        assert (tmp_path / file).read_bytes() == (whole / file).read_bytes(), file


def test_results(whole):
    metrics = json.loads((whole / "metrics.json").read_text())["fine_tune"]
    assert {"top1", "top5", "mean_per_class", "chance_top1", "chance_top5", "chance_mean_per_class"} <= metrics.keys()
    assert (metrics["examples"], metrics["train_examples"], metrics["bad_examples"]) == (12, 24, 0)
    details = json.loads((whole / "evaluation" / "fine_tune.json").read_text())
    assert [step for step, _ in details["curve"]] == [1, 2, 3, 4, 5, 6]
    assert "last step" in details["card"]["selection"]
    assert "48 px" in details["card"]["resolution"]


def test_timm_loads_the_weights_by_itself(encoder, whole):
    folder = whole / "evaluation" / "fine_tune"
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    data = open_source("scenes:val?count=12&size=32")
    ours = fine_tune.classifier(setup(encoder, data, data, size=48), len(data.class_names)).eval()
    ours.load_state_dict(load_file(folder / "model.safetensors"))
    pixels = torch.randn(3, 3, 48, 48)  # positions were resized, from 32
    torch.testing.assert_close(model(pixels), ours(pixels), rtol=1e-5, atol=1e-6)
    assert model.pretrained_cfg["label_names"] == data.class_names
    assert tuple(timm.data.resolve_model_data_config(model)["mean"]) == encoder.mean
    read, ranks, _ = fine_tune.evaluate(model, setup(encoder, data, data, size=48), range(12))
    metrics = json.loads((whole / "metrics.json").read_text())["fine_tune"]
    expected = accuracy(ranks, torch.tensor(read.labels), len(data.class_names))
    assert {name: metrics[name] for name in expected} == expected


def test_what_is_left_is_the_average_when_there_is_one(run, whole, tmp_path):
    assert command(run, tmp_path, "ema=null") == 0
    files = [out / "evaluation" / "fine_tune" / "model.safetensors" for out in (whole, tmp_path)]
    assert files[0].read_bytes() != files[1].read_bytes()


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_the_head_reads_what_it_is_told_to(encoder, pool):
    source = plain.Colours([0, 1])
    model = fine_tune.classifier(setup(encoder, source, source, pool=pool), 7)
    tokens = torch.randn(2, 17, 16)
    pooled = tokens[:, 0] if pool == "token" else tokens[:, 1:].mean(dim=1)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), pooled)
    assert model.get_classifier().weight.abs().max() < 1e-3


def test_a_class_token_that_is_not_there(encoder):
    class Without(type(encoder)):
        def __init__(self):
            self.__dict__ |= encoder.__dict__

        def backbone(self, size, drop_path=0.0):
            return timm.create_model("resnet18", num_classes=0)

    source = plain.Colours([0, 1])
    with pytest.raises(UserError, match="cannot be read by pool=token; leave it null"):
        fine_tune.classifier(setup(Without(), source, source, pool="token"), 7)
    assert fine_tune.classifier(setup(Without(), source, source), 7).fc.weight.shape == (7, 512)


# -- bad input ----------------------------------------------------------------------------------------------------

TWO = plain.Colours([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("data", "train", "settings", "message"),
    [
        (TWO, plain.Colours([1, 1, None]), {}, r"all labelled examples of colours: are 'green'; .* at least two"),
        (TWO, plain.Colours([None, None]), {}, "no example of colours: has a label; give it labelled data"),
        (plain.Colours([None]), TWO, {}, "no example of colours: has a label; give it labelled data"),
        (TWO, plain.Colours([0, 1], bad=[0, 1]), {}, r"has a label; 2 cannot be read \(colour-0 is truncated"),
        (TWO, TWO, {"size": 20}, "size 20 is not a multiple of the patch size 8; set it to 16 or 24"),
        (TWO, TWO, {"train_batch_size": 3}, "a batch of 3 cannot be divided among groups of 2"),
        (plain.Colours([0], names=["red"]), plain.Colours([0], names=["red"]), {}, "examples of colours: are 'red'"),
        (plain.Colours([0, 2], names=["red", "green"]), plain.Colours([0, 1], names=["red", "green"]), {},
         "has the label 2 but only 2 class names"),
    ],
)  # fmt: skip
def test_bad_input_is_told_before_anything_is_trained_or_written(encoder, tmp_path, data, train, settings, message):
    with pytest.raises(UserError, match=message):
        fine_tune.run(setup(encoder, data, train, tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists()


def test_what_it_cannot_be_done_with(encoder):
    def missing(data, train):
        return fine_tune.missing(setup(encoder, data, train)) or ""

    nameless = plain.Colours([0, 1], names=None)
    assert "--train-data" in missing(TWO, None)
    assert "needs class names, and colours: has none" in missing(nameless, TWO)
    assert "needs labels, and colours: has none" in missing(TWO, nameless)
    assert "has 1 classes and colours: has 7" in missing(TWO, plain.Colours([0], names=["red"]))
    assert "class 5 is 'grey'" in missing(TWO, plain.Colours([0, 1], names=[*plain.NAMES[:5], "grey", "purple"]))
    assert "would be measured on what it learned from" in missing(TWO, TWO)
    assert not missing(TWO, plain.Colours([0, 1, 1]))
    with pytest.raises(UserError, match="colour encoder is no timm model"):
        fine_tune.run(setup(plain.ColourEncoder(), TWO, TWO))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"labels": 0}, "labels must be above 0"),
        ({"labels": 1.5}, "labels must be at most 1"),
        ({"layer_decay": 0}, "layer_decay must be above 0"),
        ({"label_smoothing": 1}, "label_smoothing must be below 1"),
        ({"pool": "cls"}, "pool must be one of token, avg"),
        ({"crop_scale": [0.9, 0.2]}, "crop_scale must be two shares, the smaller first"),
        ({"ema": 1}, "ema must be below 1"),
        ({"randaugment": 31}, "randaugment must be at most 30"),
        ({"layer_decya": 0.5}, "did you mean 'layer_decay'"),
    ],
)
def test_wrong_settings(values, message):
    with pytest.raises(UserError, match=message):
        tasks.config_for("fine_tune", values)


def test_clothing(encoder, shared):
    """Real shards, labels and pictures of all shapes."""
    source = open_source(f"shards:{shared}/data/classification/clothing10/test-00000.tar")
    config = setup(encoder, source, source, steps=2, train_batch_size=8, labels=0.1).config
    outcome = fine_tune.run(Setup(encoder, source, source, config.model_copy(update={"max_examples": 40})))
    assert (outcome.metrics["examples"], outcome.metrics["train_bad_examples"]) == (40, 0)
    assert 30 < outcome.metrics["train_examples"] < 45


def test_the_card_names_every_setting_with_its_default():
    page = (Path(__file__).parents[2] / "docs" / "evaluation" / "fine_tune.md").read_text()
    table = page.partition("## Settings")[2].partition("\n## ")[0]
    written = {}
    for names, values in re.findall(r"^\| (`.+?`) \| (.+?) \|", table, re.MULTILINE):
        keys = re.findall(r"`(\w+)`", names)
        parts = [values] if len(keys) == 1 else values.split(", ")
        written |= {key: yaml.safe_load(part) for key, part in zip(keys, parts, strict=True)}
    assert written.keys() == FineTuneConfig.model_fields.keys()
    assert FineTuneConfig(**{**written, "lr": float(written["lr"])}) == FineTuneConfig()
