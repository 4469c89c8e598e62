import math
import os
import re
import signal
from dataclasses import replace

import numpy as np
import plain_metrics as plain
import pytest
import torch
from processes import Processes
from pydantic import ValidationError
from runs_for_evaluation import saved_run, tiny_recipe
from safetensors.torch import load_file

from harmony.data.scenes.words import COLOURS
from harmony.data.sources import Source, open_source
from harmony.errors import UserError
from harmony.evaluation import linear, linear_sgd, tasks
from harmony.evaluation.encoder import Encoding, Layer
from harmony.evaluation.linear import Tried, best
from harmony.evaluation.linear_data import Inputs, Probed, split
from harmony.evaluation.settings import EvaluationConfig, LinearConfig
from harmony.evaluation.task import Setup
from harmony.training import distributed
from harmony.training.signals import Interrupted

QUICK = {"regularisation": (1.0, 1e-2, 1e-4)}
SGD = {"mode": "sgd", "steps": 12, "train_batch_size": 8, "lr_factors": (1.0, 0.1), "layers": 1}


class Noisy(plain.ColourEncoder):
    """Sees the colour in the last block alone, and in its class token alone, under noise that the picture decides."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.noise = noise

    def encode(self, pixels, layers=0):
        seen = self.see(pixels)
        generator = torch.Generator().manual_seed(round(float(pixels.abs().sum()) * 1e3))
        noise = self.noise * torch.randn(2, *seen.shape, generator=generator)
        grid = [side // self.patch for side in pixels.shape[-2:]]
        patches = torch.zeros_like(seen)[:, :, None, None].expand(-1, -1, *grid)
        tokens = [noise[0]] * (self.depth - 1) + [seen + noise[1]]
        return Encoding(seen, [Layer(token, patches) for token in tokens[self.depth - layers :]])


def colours(count, of=7):
    return plain.Colours([i % of for i in range(count)])


def setup(encoder, train, test, work=None, **settings):
    if train is not None:
        train.uri = f"train-{train.uri}"  # features are kept by a source's name
    config = EvaluationConfig(workers=0, batch_size=64, linear=LinearConfig(**QUICK | settings))
    return Setup(encoder, test, train, config, work)


def run(encoder, train, test, **settings):
    return linear.run(setup(encoder, train, test, **settings))


def chosen(outcome):
    return [row for row in outcome.details["grid"] if row["chosen"]]


@pytest.mark.parametrize("mode", [{}, SGD])
def test_a_perfect_encoder_is_always_right(mode):
    outcome = run(plain.ColourEncoder(), colours(28), colours(14), **mode)
    metrics = outcome.metrics
    assert metrics["top1"] == metrics["top5"] == metrics["mean_per_class"] == metrics["validation_top1"] == 1
    assert metrics["chance_top1"] == pytest.approx(1 / 7)
    assert (metrics["examples"], metrics["train_examples"]) == (14, 28)
    assert outcome.details["confusion"][3] == [0, 0, 0, 2, 0, 0, 0]
    assert len(chosen(outcome)) == 1


@pytest.mark.parametrize("mode", [{}, SGD])
def test_a_constant_encoder_knows_nothing_but_how_often_classes_come(mode):
    uneven = plain.Colours([0] * 12 + [1, 2] * 5)
    metrics = run(plain.ConstantEncoder(), uneven, colours(21, of=7), **mode).metrics
    assert metrics["top1"] == pytest.approx(1 / 7)  # the most frequent class, whatever is shown
    even = run(plain.ConstantEncoder(), colours(28), colours(14), **mode).metrics
    assert even["top1"] <= even["chance_top1"]


def test_random_labels_score_chance():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(600, 2, 6, generator=generator)
    labels = torch.randint(4, (600,), generator=generator)
    train, test = (
        Probed(features[part], features[part, 0], labels[part], torch.arange(300), 0, 0)
        for part in (slice(300), slice(300, 600))
    )
    grid = [Tried(Inputs(n, "cls_and_mean"), value) for n in (1, 2) for value in (1.0, 0.01)]
    fitted, held_out = split(train.labels, 0.1, 0)
    found = best(linear.search(grid, train, fitted, held_out, 4, torch.device("cpu")))
    problem = linear.Problem(found.inputs.of(train.cls, train.patches), train.labels, 4)
    scores = problem.solve(found.value).scores(found.inputs.of(test.cls, test.patches))
    right = int((scores.argmax(dim=1) == test.labels).sum())
    assert abs(right - 75) < 3 * math.sqrt(300 * 0.25 * 0.75)


def test_the_test_set_has_no_say_in_what_is_chosen(tmp_path):
    train, found = colours(70), []
    for place, labels in enumerate([[i % 7 for i in range(14)], [(3 * i + 1) % 7 for i in range(14)], [6, 6, 0]]):
        folder = tmp_path / str(place)
        outcome = run(Noisy(0.5), train, plain.Colours(labels), work=folder)
        found.append((outcome.details["grid"], load_file(folder / "classifier.safetensors")))
    for grid, weights in found[1:]:
        assert grid == found[0][0]
        assert all(weights[name].equal(found[0][1][name]) for name in ("weight", "bias"))


def test_what_is_chosen_did_best_on_the_images_held_out():
    outcome = run(Noisy(0.8), colours(140), colours(14))
    grid = outcome.details["grid"]
    assert len(grid) == 2 * 2 * 3  # layers: 1 and, as there are no more, 2
    assert {row["layers"] for row in grid} == {1, 2}
    accuracies = [row["validation_top1"] for row in grid]
    assert len(set(accuracies)) > 1
    assert chosen(outcome)[0]["validation_top1"] == max(accuracies) == outcome.metrics["validation_top1"]


def test_among_equals_the_lower_loss_then_the_simpler_is_chosen():
    one, two = Inputs(1, "cls"), Inputs(2, "cls")
    assert best([Tried(one, 1.0, 0.5, 2.0), Tried(two, 1.0, 0.5, 1.0), Tried(two, 2.0, 0.4, 0.1)]).inputs == two
    assert best([Tried(one, 1.0, 0.5, 1.0), Tried(two, 1.0, 0.5, 1.0)]).inputs == one


def test_inputs_are_the_last_blocks_and_the_mean_patch():
    cls, patches = torch.arange(24.0).view(2, 4, 3), -torch.ones(2, 3)
    assert Inputs(1, "cls").of(cls, patches).tolist() == [[9, 10, 11], [21, 22, 23]]
    assert Inputs(2, "cls_and_mean").of(cls, patches)[0].tolist() == [6, 7, 8, 9, 10, 11, -1, -1, -1]


def test_the_chosen_setting_is_fitted_again_on_all_training_images(tmp_path):
    encoder, train = Noisy(0.5), colours(70)
    given = setup(encoder, train, colours(7), tmp_path)
    row = chosen(linear.run(given))[0]
    images = given.features(train).images()
    inputs = Inputs(row["layers"], row["pooling"]).of(images.cls, images.patches)
    weight, bias = linear.Problem(inputs, images.labels, 7).solve(row["regularisation"]).raw()
    saved = load_file(tmp_path / "classifier.safetensors")
    torch.testing.assert_close(saved["weight"], weight)
    torch.testing.assert_close(saved["bias"], bias)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classifier.safetensors"]


def test_the_same_twice(tmp_path):
    for mode in ({}, SGD):
        first, second = (run(Noisy(0.5), colours(42), colours(14), **mode) for _ in range(2))
        assert (first.metrics, first.details) == (second.metrics, second.details)


def test_the_split_is_stratified_and_disjoint():
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 2 + [3] + [4] * 4)[torch.randperm(67)]
    fitted, held_out = split(labels, 0.2, seed=0)
    assert sorted(fitted.tolist() + held_out.tolist()) == list(range(67))
    assert torch.bincount(labels[held_out], minlength=5).tolist() == [8, 4, 1, 0, 1]  # a single image is fitted on
    assert split(labels, 0.2, seed=0)[1].equal(held_out)
    assert not split(labels, 0.2, seed=1)[1].equal(held_out)
    assert torch.bincount(labels[split(labels, 0.5, 0)[1]]).tolist() == [20, 10, 1, 0, 2]


def test_what_cannot_be_read_and_what_has_no_label_is_counted():
    train = plain.Colours([0, 1, None, 0, 1, 0, 1, 2], bad=[7])
    metrics = run(plain.ColourEncoder(), train, plain.Colours([0, 1, 2, None, None], bad=[2])).metrics
    assert [metrics[name] for name in ("examples", "unlabelled", "bad_examples")] == [2, 2, 1]
    assert [metrics[f"train_{name}"] for name in ("examples", "unlabelled", "bad_examples")] == [6, 1, 1]
    assert metrics["top1"] == 1


def test_classes_without_training_images_are_never_right():
    metrics = run(plain.ColourEncoder(), colours(12, of=3), colours(14)).metrics
    assert metrics["top1"] == pytest.approx(3 / 7)


@pytest.mark.parametrize("mode", [{"regularisation": 0.01}, {**SGD, "lr_factors": 1}])
def test_a_single_setting_needs_no_images_to_choose_on(mode):
    outcome = run(
        plain.ColourEncoder(), colours(7), colours(14), layers=1, pooling="cls", **mode_without(mode, "layers")
    )
    assert outcome.metrics["top1"] == 1
    assert "validation_top1" not in outcome.metrics
    assert len(chosen(outcome)) == 1


def mode_without(mode, name):
    return {key: value for key, value in mode.items() if key != name}


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (colours(7), colours(7), "no class of train-colours: has two images, so none can be held out"),
        (plain.Colours([2, 2, 2]), colours(7), "are of one class; learning needs two or more"),
        (plain.Colours([None, None]), colours(7), "no example of train-colours: has a label"),
        (colours(14), plain.Colours([None]), "no example of colours: has a label"),
        (plain.Colours([0, 1, 2], names=["a", "b"]), plain.Colours([0], names=["a", "b"]), "only 2 class names"),
    ],
)
def test_labels_that_do_not_fit(train, test, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(plain.ColourEncoder(), train, test, work=tmp_path / "work")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (None, colours(7), "name them with --train-data"),
        (
            plain.Colours([0], names=None),
            colours(7),
            "and train-colours: has none; give it data",
        ),
        (colours(7), plain.Colours([0], names=None), "needs labels, and colours: has none"),
        (
            plain.Colours([0], names=["a", "b"]),
            plain.Colours([0], names=["a", "c"]),
            "class 1 is 'b' in train-colours: and 'c' in",
        ),
        (
            plain.Colours([0], names=["a", "b"]),
            plain.Colours([0], names=["a"]),
            "has 2 classes and colours: has 1",
        ),
        (colours(7), colours(7), "would be measured on what it learned from"),
        (colours(14), colours(7), None),
    ],
)
def test_sources_that_do_not_fit_are_told_before_anything_is_encoded(train, test, message):
    reason = linear.missing(setup(plain.ColourEncoder(), train, test))
    assert (reason is None) if message is None else (reason is not None and re.search(message, reason))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 5}, "less than or equal to 4"),
        ({"layers": []}, "at least one entry"),
        ({"layers": [1, 1]}, "twice"),
        ({"pooling": "mean"}, "cls_and_mean"),
        ({"regularisation": 0}, "greater than 0"),
        ({"lr_factors": -1}, "greater than 0"),
        ({"validation_share": 0.6}, "less than or equal to 0.5"),
        ({"smallest_crop": 0}, "greater than 0"),
        ({"mode": "svm"}, "lbfgs"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValidationError, match=message):
        LinearConfig(**settings)


def test_settings_are_found_by_their_names():
    config = tasks.config_for("linear", {"layers": 1, "mode": "sgd", "lr_factors": [1, 0.1]}).linear
    assert (config.layers, config.mode, config.lr_factors) == ((1,), "sgd", (1, 0.1))
    with pytest.raises(UserError, match="layers"):
        tasks.config_for("linear", {"layers": 7})


def test_a_head_learns_nothing_from_the_heads_beside_it():
    train = colours(28)
    alone, beside = (
        linear_sgd.train_heads(given, Probed.of(given.features(train).images()), torch.arange(28), kinds, 7)
        for given, kinds in (
            (setup(Noisy(0.3), train, train, **SGD | {"lr_factors": 0.1}), [Inputs(2, "cls")]),
            (setup(Noisy(0.3), train, train, **SGD), [Inputs(1, "cls"), Inputs(2, "cls")]),
        )
    )
    assert beside.classifier(3).weight.abs().max() > 0
    torch.testing.assert_close(alone.classifier(0).weight, beside.classifier(3).weight)
    torch.testing.assert_close(alone.classifier(0).bias, beside.classifier(3).bias)


class StopsAt(plain.ColourEncoder):
    """Sends its process a signal at one of the batches it encodes."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.left = batch

    def fingerprint(self):
        return "the same whether it stops or not"

    def encode(self, pixels, layers=0):
        if len(pixels) == 8:  # a batch of training
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGTERM)
        return super().encode(pixels, layers)


def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path):
    train, test = colours(42), colours(14)
    whole = linear.run(setup(StopsAt(0), train, test, tmp_path / "whole", **SGD))
    with pytest.raises(Interrupted):
        linear.run(setup(StopsAt(5), train, test, tmp_path / "parts", **SGD))
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["fit.pt"]
    encoder = StopsAt(0)
    resumed = linear.run(setup(encoder, train, test, tmp_path / "parts", **SGD))
    assert encoder.left == -7  # of twelve steps
    assert (resumed.metrics, resumed.details) == (whole.metrics, whole.details)
    saved = [load_file(tmp_path / name / "classifier.safetensors") for name in ("whole", "parts")]
    assert saved[0]["weight"].equal(saved[1]["weight"])
    # The checkpoint goes once the results are written.
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {"classifier.safetensors", "fit.pt"}


def test_crops_are_augmented_and_a_function_of_the_step():
    train = open_source("scenes:train?count=16")
    given = setup(plain.ColourEncoder(), train, colours(7), **SGD)
    labelled = Probed.of(given.features(train).images())
    batches = linear_sgd.Augmented(given, labelled, torch.arange(16))
    pixels, labels = batches[1]
    assert (pixels.shape, pixels.dtype) == ((8, 3, 8, 8), torch.uint8)
    again = batches[1]
    assert pixels.equal(again[0]) and labels.equal(again[1])
    assert sorted(torch.cat([batches[0][1], labels]).tolist()) == sorted(labelled.labels.tolist())
    whole = linear_sgd.Augmented(
        replace(given, config=EvaluationConfig(linear=LinearConfig(**SGD, smallest_crop=1.0))),
        labelled,
        torch.arange(16),
    )
    assert not whole[1][0].equal(pixels)
    assert whole[1][1].equal(labels)


def test_an_image_that_can_no_longer_be_read_is_told():
    train = colours(14)
    given = setup(plain.ColourEncoder(), train, train, **SGD)
    labelled = Probed.of(given.features(train).images())
    train.bad = {3}
    with pytest.raises(UserError, match=r"colour-3 of train-colours: is truncated .* although it could be read before"):
        linear_sgd.Augmented(given, labelled, torch.arange(14)).make([3])


class ColoursOfScenes(Source):
    """Scenes classed by the main thing's colour, kept in memory."""

    def __init__(self, uri):
        scenes = open_source(uri)
        self.uri, self.class_names = uri, list(COLOURS)
        self.examples = [scenes[i] for i in range(len(scenes))]

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        return replace(self.examples[i], label=self.examples[i].label % len(COLOURS))

    def key(self, i):
        return self.examples[i].key

    def fingerprint(self):
        return self.uri


class Histogram(plain.ColourEncoder):
    """How much of each of 27 colours is in an image; or, blind, nothing."""

    def __init__(self, blind):
        super().__init__()
        self.size, self.patch, self.embed, self.width, self.blind = 16, 8, 27, 27, blind

    def see(self, pixels):
        thirds = (self.denormalise(pixels).long() * 3 // 256).unbind(1)
        found = torch.nn.functional.one_hot(9 * thirds[0] + 3 * thirds[1] + thirds[2], 27)
        return found.float().mean(dim=(1, 2)) * (not self.blind)


@pytest.fixture(scope="module")
def scenes():
    return ColoursOfScenes("scenes:train?count=160&size=32"), ColoursOfScenes("scenes:val?count=80&size=32")


@pytest.mark.parametrize("mode", [{}, SGD | {"steps": 30, "train_batch_size": 24}])
def test_colours_of_scenes_tell_more_than_nothing(scenes, mode):
    train, test = scenes
    sees, blind = (run(Histogram(blind), train, test, **mode).metrics for blind in (False, True))
    deviation = math.sqrt(1 / 8 * 7 / 8 / 80)
    assert blind["top1"] <= blind["chance_top1"] + 3 * deviation
    assert sees["top1"] > blind["chance_top1"] + 3 * deviation
    assert sees["top1"] > blind["top1"]


@pytest.mark.parametrize("mode", ["lbfgs", "sgd"])
def test_a_run_is_measured_and_says_its_protocol(tmp_path, mode):
    saved = saved_run(tmp_path / "run", tiny_recipe())
    outcome = tasks.run(
        str(saved.folder),
        "linear",
        "scenes:val?count=16&size=32",
        "scenes:train?count=32&size=32",
        settings={
            "workers": 0,
            "mode": mode,
            "steps": 3,
            "train_batch_size": 16,
            "layers": 1,
            "regularisation": [1, 0.1],
        },
        out=tmp_path / "out",
    )
    assert outcome.metrics["examples"] == 16
    assert 0 <= outcome.metrics["top1"] <= 1
    card = outcome.details["card"]
    assert "held out (seed 0)" in card["selection"]
    assert ("SGD" in card["optimiser"]) == (mode == "sgd")
    files = sorted(path.name for path in (tmp_path / "out" / "evaluation" / "linear").iterdir())
    assert files == ["classifier.safetensors"]


def test_cifar10_by_colours(shared):
    """The probe finds in real images what it must: mean colours of quarters tell airplanes from frogs, not more."""
    data = np.load(shared / "data" / "classification" / "cifar10_subset.npz")
    parts = []
    for name in ("train", "test"):
        pixels = torch.from_numpy(data[f"{name}_images"]).permute(0, 3, 1, 2).float()[:1500]
        colours_of = torch.nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(1)
        labels = torch.from_numpy(data[f"{name}_labels"])[:1500]
        parts.append(Probed(colours_of[:, None], colours_of, labels, torch.arange(len(labels)), 0, 0))
    train, test = parts
    grid = [Tried(Inputs(1, "cls"), value) for value in (1.0, 0.1, 0.01, 1e-3)]
    fitted, held_out = split(train.labels, 0.1, 0)
    found = best(linear.search(grid, train, fitted, held_out, 10, torch.device("cpu")))
    scores = linear.Problem(train.cls[:, 0], train.labels, 10).solve(found.value).scores(test.cls[:, 0])
    assert 0.2 < float((scores.argmax(dim=1) == test.labels).float().mean()) < 0.5


def _on_rank(folder):
    with distributed.session() as place:
        assert place.ranks == 2
        found = [run(Noisy(0.5), colours(70), colours(14), **mode) for mode in ({}, SGD)]
        train = Probed.of(setup(Noisy(0.5), None, colours(71)).features(colours(71)).images())
        solution = linear.Problem(train.cls.flatten(1).double(), train.labels, 7).solve(0.01, tolerance=1e-8)
        torch.save([[(each.metrics, each.details) for each in found], solution.weight], folder / str(place.rank))


def test_two_processes_choose_and_find_the_same(tmp_path):
    Processes(_on_rank, tmp_path, ranks=2, output=tmp_path / "printed").finish()
    (first, weight), (second, other) = (torch.load(tmp_path / str(rank), weights_only=False) for rank in (0, 1))
    assert first == second
    assert weight.equal(other)
    train = Probed.of(setup(Noisy(0.5), None, colours(71)).features(colours(71)).images())
    alone = linear.Problem(train.cls.flatten(1).double(), train.labels, 7).solve(0.01, tolerance=1e-8)
    torch.testing.assert_close(weight, alone.weight, atol=1e-6, rtol=0)
    assert first[0][0]["top1"] == run(Noisy(0.5), colours(70), colours(14)).metrics["top1"]
