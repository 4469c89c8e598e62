import plain_metrics as plain
import pytest
import torch

from harmony.errors import UserError
from harmony.evaluation import zero_shot
from harmony.evaluation.classification import accuracy, per_class
from harmony.evaluation.settings import EvaluationConfig, ZeroShotConfig
from harmony.evaluation.zero_shot import class_embeddings

CONFIG = EvaluationConfig(batch_size=3, workers=0)


def run(encoder, source, config=CONFIG):
    return zero_shot.run(plain.setup(encoder, source, config))


def test_a_perfect_predictor_is_always_right():
    outcome = run(plain.ColourEncoder(), plain.Colours([0, 1, 2, 3, 4, 5, 6, 6, 6]))
    assert outcome.metrics["top1"] == outcome.metrics["top5"] == outcome.metrics["mean_per_class"] == 1
    assert outcome.metrics["chance_top1"] == pytest.approx(1 / 7)
    assert outcome.metrics["chance_top5"] == pytest.approx(5 / 7)
    assert outcome.details["confusion"][6] == [0, 0, 0, 0, 0, 0, 3]


def test_a_perfectly_wrong_predictor_is_never_right():
    outcome = run(plain.ColourEncoder(wrong=True), plain.Colours([0, 1, 2, 3]))
    assert outcome.metrics["top1"] == outcome.metrics["mean_per_class"] == 0
    assert outcome.details["confusion"][0][1] == 1


def test_a_constant_encoder_is_never_right():
    outcome = run(plain.ConstantEncoder(), plain.Colours([0, 1, 2, 3, 4, 5, 6]))
    metrics = outcome.metrics
    assert metrics["top1"] == metrics["top5"] == metrics["mean_per_class"] == 0
    assert [one["top1"] for one in outcome.details["classes"]] == [0] * 7  # in the report, too
    assert sum(outcome.details["confusion"][i][i] for i in range(7)) == 0


def test_accuracies_by_hand():
    ranks, labels = torch.tensor([1, 1, 2, 6, 1, 5]), torch.tensor([0, 0, 0, 0, 1, 2])
    metrics = accuracy(ranks, labels, classes=8)
    assert metrics["top1"] == 3 / 6
    assert metrics["top5"] == 5 / 6
    assert metrics["mean_per_class"] == pytest.approx((2 / 4 + 1 + 0) / 3)  # classes without images do not count
    assert per_class(ranks, labels, 8)[:3].tolist() == [0.5, 1, 0]
    assert per_class(ranks, labels, 8)[3:].isnan().all()


def test_no_top5_for_five_classes():
    assert "top5" not in accuracy(torch.tensor([1]), torch.tensor([0]), classes=5)
    assert "top5" in accuracy(torch.tensor([1]), torch.tensor([0]), classes=6)


def test_templates_are_averaged_after_they_are_brought_to_unit_length():
    class Lengths(plain.ColourEncoder):
        """Embeds a text by its letters, at very different lengths."""

        def texts(self, texts):
            counts = [[text.count(letter) for letter in "adegilr"] for text in texts]
            return torch.tensor(counts, dtype=torch.float32) + 0.1

    encoder = Lengths()
    source = plain.Colours([0])
    features = plain.setup(encoder, source, CONFIG).features(source)
    templates = ("a {}", "a large great grand {}", "{}")
    got = class_embeddings(features, ["red", "green"], templates)
    for row, name in enumerate(["red", "green"]):
        vectors = [encoder.texts([template.replace("{}", name)])[0] for template in templates]
        mean = sum(vector / vector.norm() for vector in vectors) / 3
        torch.testing.assert_close(got[row], mean / mean.norm())


def test_examples_without_label_and_bad_ones_are_counted():
    metrics = run(plain.ColourEncoder(), plain.Colours([0, None, 1, 2, None], bad=[2])).metrics
    assert (metrics["examples"], metrics["unlabelled"], metrics["bad_examples"]) == (2, 2, 1)
    assert metrics["top1"] == 1


def test_templates_of_a_file(tmp_path):
    file = tmp_path / "templates.txt"
    file.write_text("# mine\n\na {} thing\n{}\n")
    config = CONFIG.model_copy(update={"zero_shot": ZeroShotConfig(templates=str(file))})
    assert run(plain.ColourEncoder(), plain.Colours([0, 1]), config).details["templates"] == ["a {} thing", "{}"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (plain.Colours([0, 2], names=["red", "green"]), "has the label 2 but only 2 class names"),
        (plain.Colours([None, None]), "no example of colours: has a label"),
        (plain.Colours([0, 1], names=["red", "green", "red"]), "'red' stands for several classes"),
    ],
)
def test_data_that_do_not_fit(source, message):
    with pytest.raises(UserError, match=message):
        run(plain.ColourEncoder(), source)


def test_what_has_no_zero_shot_says_why():
    images_alone = plain.setup(plain.ColourEncoder(reads_text=False), plain.Colours([0]), CONFIG)
    nameless = plain.setup(plain.ColourEncoder(), plain.Colours([0], names=None), CONFIG)
    assert "trained on images alone" in (zero_shot.missing(images_alone) or "")
    assert "has none" in (zero_shot.missing(nameless) or "")
    one_class = plain.setup(plain.ColourEncoder(), plain.Colours([0], names=["red"]), CONFIG)
    assert "one class, 'red'" in (zero_shot.missing(one_class) or "")
    assert zero_shot.missing(plain.setup(plain.ColourEncoder(), plain.Colours([0]), CONFIG)) is None
