"""VICReg against a plain transcription, and what becomes of it without the terms that keep it from collapsing."""

from contextlib import closing
from dataclasses import replace

import pytest
import torch
from parts import assert_same, batch_of, learner_of, losses_of
from torch import Tensor

from harmony import recipe as recipes
from harmony.data.batch import Batch
from harmony.errors import UserError
from harmony.objectives.vicreg import correlation, missing_spread
from harmony.training.distributed import Place
from harmony.training.trainer import Trainer

HEAD = {"hidden": 16, "output": 6, "layers": 3}


def plain_loss(a: Tensor, b: Tensor, weights: tuple[float, float, float]) -> Tensor:
    """Equation 6, one number at a time."""
    n, d = a.shape
    invariance = sum((a[i, j] - b[i, j]) ** 2 for i in range(n) for j in range(d)) / (n * d)
    variance = covariance = torch.zeros((), dtype=torch.float64)
    for z in (a, b):
        means = [sum(z[i, j] for i in range(n)) / n for j in range(d)]

        def cov(j: int, k: int, z: Tensor = z, means: list[Tensor] = means) -> Tensor:
            return sum((z[i, j] - means[j]) * (z[i, k] - means[k]) for i in range(n)) / (n - 1)

        variance = variance + sum(torch.relu(1 - (cov(j, j) + 1e-4).sqrt()) for j in range(d)) / d
        covariance = covariance + sum(cov(j, k) ** 2 for j in range(d) for k in range(d) if j != k) / d
    return weights[0] * invariance + weights[1] * variance + weights[2] * covariance


def test_vicreg():
    learner = learner_of({"vicreg": {"head": HEAD, "invariance": 20, "variance": 15, "covariance": 2}})
    batch, head = batch_of(learner), learner.objectives["vicreg"].head
    a, b = (head(learner.student.image.encode(crop).cls) for crop in batch.images["global"])
    assert_same(losses_of(learner, batch)["vicreg"], plain_loss(a, b, (20.0, 15.0, 2.0)), learner)
    signs = learner.signs()
    parts = [float(signs[f"vicreg/{name}"]) for name in ("invariance", "variance", "covariance")]
    expected = [float(plain_loss(a, b, weights).detach()) for weights in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert parts == pytest.approx(expected)


def test_terms_are_zero_where_nothing_is_wrong():
    z = torch.randn(20_000, 3, dtype=torch.float64)
    white = torch.linalg.qr(z - z.mean(0))[0] * 19_999**0.5
    assert float(missing_spread(white)) == pytest.approx(0, abs=1e-9)
    assert float(correlation(white)) == pytest.approx(0, abs=1e-12)
    assert float(missing_spread(torch.ones(5, 3))) == pytest.approx(1 - 0.01), "all alike: 1 less the root of epsilon"
    twins = white[:, :1].expand(-1, 2)
    assert float(correlation(twins)) == pytest.approx(1), "two equal variables: 2 covariances of 1, divided by 2"


def test_one_image_gives_a_finite_loss():
    learner = learner_of({"vicreg": {"head": HEAD}})
    assert losses_of(learner, batch_of(learner, examples=1))["vicreg"].isfinite()


def test_one_crop_is_refused():
    with pytest.raises(UserError, match=r"views.plain.count=2"):
        learner_of({"vicreg": {"view": "plain", "head": HEAD}})


SCENES = (
    "model.image={width: 32, depth: 1, heads: 2}",
    "data={train: 'scenes:train?size=24&count=128', val: null, batch_size: 64, workers: 0}",
    "views.global.size=24",
    "optim={lr: 0.004, warmup: 5 steps, weight_decay: 0}",
    "train.steps=30",
)
HERE = Place(torch.device("cpu"), rank=0, ranks=1)


@pytest.fixture(scope="module")
def scenes() -> list[Batch]:
    """An epoch of real crops, seen again and again."""
    with closing(Trainer(recipes.load("vicreg-small", SCENES), HERE).loader.batches(0)) as batches:
        return [next(batches) for _ in range(2)]


@pytest.mark.parametrize("norm", ["none", "hidden"])
def test_invariance_alone_collapses_and_the_signs_tell(scenes: list[Batch], norm: str):
    """Without norms features collapse, too; with them the last layer gets there first."""

    def signs_after(*overrides: str) -> dict[str, float]:
        head = f"objectives.vicreg.head={{hidden: 64, output: 32, layers: 2, norm: {norm}}}"
        trainer = Trainer(recipes.load("vicreg-small", [*SCENES, head, *overrides]), HERE)
        for step in range(30):
            trainer.stepper.step([scenes[step % 2]], replace(trainer.clock, step=step), logged=True)
        return {name: float(value) for name, value in trainer.learner.signs().items()}

    intact = signs_after()
    broken = signs_after("objectives.vicreg.variance=0", "objectives.vicreg.covariance=0")
    assert intact["vicreg/spread"] > 0.5 and broken["vicreg/spread"] < 0.1
    assert intact["student_image/rank"] > 4 > broken["student_image/rank"]
    if norm == "none":
        assert intact["student_image/std"] > 0.3 and broken["student_image/std"] < 0.1
        assert broken["student_image/rank"] < 2
