import json

import numpy as np
import plain_metrics as plain
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from processes import Processes
from pydantic import ValidationError
from runs_for_evaluation import saved_run, tiny_recipe
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from harmony.data.sources import open_source
from harmony.errors import UserError
from harmony.evaluation import knn, store, tasks
from harmony.evaluation.encoder import Encoding, Layer
from harmony.evaluation.knn import judged, nearest
from harmony.evaluation.settings import EvaluationConfig, KnnConfig
from harmony.evaluation.task import Setup
from harmony.training import distributed

EVERY_COLOUR = [i % 7 for i in range(35)]


def config(**own):
    own = {"ks": [1, 3, 5], "k": 3} | own
    return EvaluationConfig(batch_size=4, workers=0, knn=KnnConfig(**own))


def setup(train, data, encoder=None, **own):
    return plain.setup(encoder or plain.ColourEncoder(), data, config(**own), train)


def measure(*arguments, **own):
    asked = setup(*arguments, **own)
    assert knn.missing(asked) is None
    return knn.run(asked)


def blocks_of(features, labels, size):
    return zip(features.split(size), labels.split(size), strict=True)


def drawn(seed, images, width=12, classes=9):
    generator = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(images, width, generator=generator), dim=1)
    return features, torch.randint(classes, (images,), generator=generator)


# Against independent implementations


@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("block", [1, 7, 1000])
def test_votes_are_those_of_scikit_learn(k, temperature, block):
    (features, classes), (queries, labels) = drawn(0, 150), drawn(1, 60)
    similarity, voters = nearest(queries, blocks_of(features, classes, block), 20)
    ranks, predicted = judged(similarity, voters, labels, k, 9, temperature)
    reference = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    )
    reference.fit(features.double().numpy(), classes.numpy())
    expected = reference.predict(queries.double().numpy())
    assert predicted.tolist() == expected.tolist()
    assert ((ranks == 1) == (predicted == labels)).all()
    shares = reference.predict_proba(queries.double().numpy())
    own = shares[range(60), labels]
    voted = own > 0
    # A class that nobody votes for shares its place with all others of that kind, and comes behind them.
    assert ranks[voted].tolist() == [1 + int((row > x).sum()) for row, x in zip(shares[voted], own[voted], strict=True)]
    assert (ranks[~voted] == 9).all()


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=12),
    st.lists(st.integers(0, 4), min_size=1, max_size=6),
    st.integers(1, 5),
)
def test_the_nearest_are_those_of_a_full_sort_however_cut(train, asked, block):
    """Few different directions, so that most similarities are ties: the first in the data come first."""
    directions = F.normalize(torch.tensor([[1.0, 0], [0, 1], [1, 1], [-1, 0], [1, -1]]), dim=1)
    features, queries = directions[train], directions[asked]
    labels = torch.arange(len(train))
    similarity, voters = nearest(queries, blocks_of(features, labels, block), len(train))
    full = queries @ features.T
    assert voters.equal(full.argsort(dim=1, descending=True, stable=True))
    torch.testing.assert_close(similarity.float(), full.sort(dim=1, descending=True).values)


def test_queries_cut_into_blocks_change_nothing(monkeypatch):
    (features, classes), (queries, labels) = drawn(0, 50), drawn(1, 23)
    whole = nearest(queries, blocks_of(features, classes, 50), 7)
    judgement = judged(*whole, labels, 7, 9, 0.07)
    monkeypatch.setattr(knn, "QUERIES", 4)
    cut = nearest(queries, blocks_of(features, classes, 6), 7)
    torch.testing.assert_close(cut, whole)
    for one, other in zip(judged(*cut, labels, 7, 9, 0.07), judgement, strict=True):
        assert one.equal(other)


def test_votes_by_hand():
    """Two near votes outweigh three far ones at a low temperature, and do not at a high one."""
    similarity = torch.tensor([[0.9, 0.8, 0.5, 0.5, 0.5]], dtype=torch.float64)
    voters, label = torch.tensor([[1, 1, 0, 0, 0]]), torch.tensor([1])
    assert [tensor.tolist() for tensor in judged(similarity, voters, label, 5, 2, 0.07)] == [[1], [1]]
    assert [tensor.tolist() for tensor in judged(similarity, voters, label, 5, 2, 100.0)] == [[2], [0]]
    assert judged(similarity, voters, label, 2, 2, 100.0)[1].tolist() == [1]
    # The weights of very small temperatures are far beyond what a number can hold.
    assert judged(similarity, voters, label, 5, 2, 1e-5)[1].tolist() == [1]


def test_equal_votes_count_against():
    similarity = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    for label in (0, 1):
        ranks, predicted = judged(similarity, torch.tensor([[0, 1]]), torch.tensor([label]), 2, 4, 0.07)
        assert ranks.tolist() == [2]
        assert predicted.tolist() == [1 - label]  # what is counted as wrong is shown as wrong


# The task


def test_a_perfect_predictor_is_always_right():
    outcome = measure(plain.Colours(EVERY_COLOUR), plain.Colours([0, 1, 2, 3, 4, 5, 6, 6, 6]))
    for name in ("top1", "top5", "mean_per_class", "top1@1", "top1@3", "top1@5", "mean_per_class@5"):
        assert outcome.metrics[name] == 1
    assert outcome.metrics["chance_top1"] == outcome.metrics["chance_top1@3"] == pytest.approx(1 / 7)
    assert outcome.metrics["k"] == 3
    assert outcome.details["confusion"][6] == [0, 0, 0, 0, 0, 0, 3]


class Relabelled(plain.Colours):
    """Its labels are those of the next colour."""

    def __getitem__(self, i):
        example = super().__getitem__(i)
        return type(example)(example.key, example.image, example.captions, (example.label + 1) % 7)

    def fingerprint(self):
        return f"relabelled {super().fingerprint()}"


def test_a_perfectly_wrong_predictor_is_never_right():
    """The labels learned from say the next colour."""
    outcome = measure(Relabelled(EVERY_COLOUR), plain.Colours([0, 1, 2, 3]))
    assert outcome.metrics["top1"] == outcome.metrics["mean_per_class"] == outcome.metrics["top1@1"] == 0
    assert outcome.details["confusion"][0][1] == 1


def test_an_encoder_that_sees_nothing_scores_chance():
    """All images are equally near; the first of the training data vote, whatever is asked."""
    outcome = measure(plain.Colours(EVERY_COLOUR), plain.Colours(EVERY_COLOUR + [0]), plain.ConstantEncoder())
    assert outcome.metrics["top1@1"] == pytest.approx(6 / 36)
    assert outcome.metrics["mean_per_class@1"] == pytest.approx(1 / 7)
    assert outcome.metrics["top1@3"] == 0  # three classes with one equal vote each


@pytest.mark.parametrize("shards", [(1000, 1000), (5, 4)])
def test_random_labels_score_chance(monkeypatch, shards):
    monkeypatch.setattr(store, "SMALLEST", shards[0])
    monkeypatch.setattr(store, "WANTED", 1000)
    generator = torch.Generator().manual_seed(0)
    train, data = (torch.randint(7, (200,), generator=generator).tolist() for _ in range(2))

    class Random(plain.ColourEncoder):
        def see(self, pixels):
            return torch.randn(len(pixels), self.embed, generator=generator)

    metrics = measure(plain.Colours(train), plain.Colours(data), Random(), ks=[20], k=20, block=17).metrics
    assert metrics["top1"] == pytest.approx(1 / 7, abs=3.5 * (6 / 49 / 200) ** 0.5)
    assert metrics["top5"] == pytest.approx(5 / 7, abs=3.5 * (10 / 49 / 200) ** 0.5)


class Parts(plain.ColourEncoder):
    """Class token, embedding and patches each see one colour channel alone."""

    def encode(self, pixels, layers=0):
        red, green, blue = (
            F.one_hot((pixels.mean(dim=(2, 3))[:, channel] > 0).long(), 7).float() for channel in range(3)
        )
        below = Layer(torch.ones_like(red), torch.ones(len(red), 7, 1, 1))
        return Encoding(green, [below] * (layers - 1) + [Layer(5 * red, blue[:, :, None, None])])


def test_the_representation_is_the_one_asked_for():
    """Accuracies against the best that can be done with what each part sees."""
    train, data = plain.Colours(EVERY_COLOUR), plain.Colours([0, 1, 2, 3, 4, 5, 6])
    for representation, width in (("cls", 7), ("embedding", 7), ("cls_patches", 14)):
        asked = setup(train, data, Parts(), representation=representation)
        learned, _, _ = knn.labelled_pair(asked)
        vectors = learned.vectors(representation)
        assert vectors.shape == (35, width)
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(35))
    bright = (torch.tensor(plain.PALETTE) / 255 > torch.tensor([0.5, 0.4, 0.3])).long()

    def seen(representation, *channels):
        asked = setup(train, data, Parts(), representation=representation)
        own = knn.labelled_pair(asked)[1].vectors(representation)
        same = (own @ own.T) > 0.999
        assert same.equal((bright[:, None, channels] == bright[None, :, channels]).all(dim=2))

    seen("cls", 0)
    seen("embedding", 1)
    seen("cls_patches", 0, 2)


@pytest.mark.filterwarnings("ignore::UserWarning:sklearn")
def test_metrics_are_those_of_scikit_learn_on_scenes(tmp_path):
    run = saved_run(tmp_path, tiny_recipe())
    settings = {"workers": 0, "ks": [1, 9], "k": 9, "block": 16}
    metrics = tasks.run(
        str(run.folder), "knn", "scenes:val?count=40", "scenes:train?count=80", settings=settings, out=tmp_path
    ).metrics
    encoder = tasks.load_encoder(str(run.folder))
    own = Setup(encoder, open_source("scenes:val?count=40"), open_source("scenes:train?count=80"), EvaluationConfig())
    train, data, names = knn.labelled_pair(own)
    reference = KNeighborsClassifier(
        9, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    )
    reference.fit(train.images.cls[:, -1].double().numpy(), train.labels.numpy())
    predicted = reference.predict(data.images.cls[:, -1].double().numpy())
    assert metrics["top1"] == metrics["top1@9"] == pytest.approx((predicted == data.labels.numpy()).mean())
    assert metrics["mean_per_class"] == pytest.approx(balanced_accuracy_score(data.labels.numpy(), predicted))
    assert (metrics["examples"], metrics["train_examples"]) == (40, 80)
    assert json.loads((tmp_path / "metrics.json").read_text())["knn"] == metrics
    card = json.loads((tmp_path / "evaluation" / "knn.json").read_text())["card"]
    assert "scenes:train?count=80" in card["split"]
    assert len(names) > 20


class Painted(plain.Colours):
    """Scenes painted once, for two encoders."""

    def __init__(self, uri):
        source = open_source(uri)
        self.uri, self.class_names = uri, source.class_names
        self.examples = [source[i] for i in range(len(source))]

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        return self.examples[i]

    def fingerprint(self):
        return self.uri


class Histogram(plain.ColourEncoder):
    """How often each of 64 colours comes in an image."""

    def __init__(self):
        super().__init__()
        self.size, self.patch = 32, 16
        self.embed = self.width = 64

    def see(self, pixels):
        red, green, blue = (self.denormalise(pixels).long() // 64).unbind(dim=1)
        return F.one_hot(16 * red + 4 * green + blue, 64).float().mean(dim=(1, 2)).sqrt()


def test_features_of_colour_beat_chance_on_scenes_and_those_of_nothing_do_not():
    sources = Painted("scenes:train?count=300&size=32"), Painted("scenes:val?count=100&size=32")
    seeing = measure(*sources, Histogram(), ks=[10], k=10).metrics
    blind = measure(*sources, plain.ConstantEncoder(), ks=[10], k=10).metrics
    assert seeing["top1"] > 4 * seeing["chance_top1"]
    assert seeing["top5"] > 2 * seeing["chance_top5"]
    assert blind["top1"] < 2 * blind["chance_top1"]


class Drawn(plain.ColourEncoder):
    """Gives training and test images, in turn, what was drawn for them."""

    def __init__(self, vectors):
        super().__init__()
        self.width, self.vectors, self.given = 12, vectors, 0

    def encode(self, pixels, layers=0):
        own = self.vectors[self.given : self.given + len(pixels)]
        self.given += len(pixels)
        return Encoding(own[:, :7], [Layer(own, own[:, :, None, None])] * layers)


def of_drawn():
    """Metrics and details of neighbours among what was drawn."""
    (features, classes), (queries, labels) = drawn(0, 60, classes=7), drawn(1, 21, classes=7)
    sources = Numbered(classes.tolist(), names=None), Numbered(labels.tolist(), names=None)
    outcome = measure(*sources, Drawn(torch.cat([features, queries])), ks=[1, 5, 20], k=5, block=7)
    return [outcome.metrics, outcome.details]


def _on_rank(folder):
    with distributed.session() as place:
        assert place.ranks == 2
        (folder / f"{place.rank}.json").write_text(json.dumps(of_drawn()))


def test_two_ranks_find_what_one_finds(tmp_path):
    alone = of_drawn()  # the ranks find its features: those of one process
    Processes(_on_rank, tmp_path, ranks=2, output=tmp_path / "printed").finish()
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == alone
    assert 0 < alone[0]["top1@20"] < 1


# What is counted, and what is refused


def test_examples_without_label_and_bad_ones_are_counted():
    train = plain.Colours([*EVERY_COLOUR, None, None], bad=[0, 1, 2])
    metrics = measure(train, plain.Colours([0, None, 1, 2, None], bad=[2])).metrics
    assert (metrics["examples"], metrics["unlabelled"], metrics["bad_examples"]) == (2, 2, 1)
    assert (metrics["train_examples"], metrics["train_unlabelled"], metrics["train_bad_examples"]) == (32, 2, 3)
    assert metrics["top1"] == 1


def test_a_k_larger_than_the_training_set_is_left_out_and_told(capsys):
    metrics = measure(plain.Colours([0, 1, 0, 1]), plain.Colours([0, 1, 1]), ks=[2, 4, 5, 20], k=20).metrics
    assert "left out: k = 5, 20" in capsys.readouterr().err
    assert metrics["k"] == 4  # the largest that fits, whatever it scores
    assert {name for name in metrics if name.startswith("top1@")} == {"top1@2", "top1@4"}
    told = "wants 5 neighbours or more, and colours: has 4 labelled images; lower ks"
    with pytest.raises(UserError, match=told):
        measure(plain.Colours([0, 1, 0, 1]), plain.Colours([0, 1, 1]), ks=[5, 20], k=20)
    with pytest.raises(UserError, match=told):  # one has no label, which is seen once all are read
        measure(plain.Colours([0, 1, 0, 1, None]), plain.Colours([0, 1, 1]), ks=[5, 20], k=20)


@pytest.mark.parametrize(
    ("train", "data", "message"),
    [
        (None, plain.Colours([0]), "knn learns from labelled data; name them with --train-data"),
        (plain.Colours([0], names=None), plain.Colours([0]), "needs labels, and colours: has none"),
        (plain.Colours([0]), plain.Colours([0], names=None), "needs labels, and colours: has none"),
        (plain.Colours([0, 1]), plain.Colours([0, 1]), "measured on what it learned from"),
        (
            plain.Colours([0], names=plain.NAMES[:5]),
            plain.Colours([0, 1]),
            "colours: has 5 classes and colours: has 7; both need the same classes in the same order",
        ),
        (plain.Colours([0], names=["red", *plain.NAMES[:0:-1]]), plain.Colours([0, 1]), "class 1 is 'purple' in"),
    ],
)
def test_data_that_do_not_go_together(train, data, message):
    assert message in (knn.missing(setup(train, data)) or "")


@pytest.mark.parametrize(
    ("train", "data", "message"),
    [
        (plain.Colours([3, 3, None, 3, 3, 3]), plain.Colours([0, 1]), "all labelled images of colours: are of one"),
        (plain.Colours([None, None]), plain.Colours([0, 1]), "no example of colours: has a label"),
        (plain.Colours([0, 1]), plain.Colours([None]), "no example of colours: has a label"),
        (
            plain.Colours([0, 1, 6], names=["red", "green"]),
            plain.Colours([0, 1, 1], names=["red", "green"]),
            "has the label 6 but only 2 class names",
        ),
    ],
)
def test_data_that_nothing_can_be_learned_from(train, data, message):
    with pytest.raises(UserError, match=message):
        measure(train, data)


class Numbered(plain.Colours):
    """Labels that are numbers, without names."""

    def has_labels(self):
        return True


def test_classes_without_names_are_numbered():
    outcome = measure(Numbered([0, 1, 2] * 3, names=None), Numbered([0, 1, 4], names=None))
    assert [one["name"] for one in outcome.details["classes"]] == ["0", "1", "2", "3", "4"]
    assert outcome.metrics["top1"] == pytest.approx(2 / 3)  # class 4 has no training image


def test_names_on_one_side_alone_are_refused():
    asked = setup(plain.Colours([0, 1]), Numbered([0, 1, 1], names=None))
    assert "has class names and colours: has none" in (knn.missing(asked) or "")


def test_settings():
    assert KnnConfig(ks=20).ks == (20,)
    assert KnnConfig(ks=[20, 5, 20]).ks == (5, 20)
    for wrong in ({"ks": []}, {"ks": [0, 20]}, {"ks": [10], "k": 20}, {"temperature": 0}, {"representation": "mean"}):
        with pytest.raises(ValidationError):
            KnnConfig(**wrong)
    with pytest.raises(UserError, match="k 20 is not one of ks 5, 10; add it to ks, or set k to one of them"):
        tasks.config_for("knn", {"ks": [5, 10]})


def test_on_clothing(shared, tmp_path):
    """Photographs: even patches as first drawn know colours, and are above chance by some standard deviations."""
    folder = f"shards:{shared}/data/classification/clothing10"
    run = saved_run(tmp_path, tiny_recipe())
    settings = {"max_examples": 400, "workers": 0, "representation": "cls_patches"}
    uris = f"{folder}/test-00000.tar", f"{folder}/train-{{00000..00001}}.tar"
    metrics = tasks.run(str(run.folder), "knn", *uris, settings=settings).metrics
    assert (metrics["train_examples"], metrics["bad_examples"], metrics["chance_top1"]) == (400, 0, 0.1)
    assert 0.13 < metrics["top1"] < 0.5
