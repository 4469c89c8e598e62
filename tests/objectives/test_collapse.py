"""Methods broken on purpose collapse, and the signs that a run logs tell which way."""

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from harmony import recipe as recipes
from harmony.data.batch import Batch
from harmony.objectives import registry
from harmony.objectives.base import Encoded, Request
from harmony.objectives.dino import Dino, cross_entropy_of_other_crops
from harmony.objectives.targets import full_precision, signs_of_collapse
from harmony.schedules import At
from harmony.training.distributed import Place
from harmony.training.trainer import Trainer

HERE = Place(torch.device("cpu"), rank=0, ranks=1)
STEPS = 40
PROTOTYPES = 64
SCENES = (
    "model.image={width: 32, depth: 1, heads: 2}",
    "data={train: 'scenes:train?size=24&count=128', val: null, batch_size: 64, workers: 0}",
    "views.global.size=24",
    "optim={lr: 0.004, warmup: 5 steps, weight_decay: 0}",
    f"train.steps={STEPS}",
)
DINO = ("views.local.size=16", f"objectives.dino.head={{prototypes: {PROTOTYPES}, hidden: 64, bottleneck: 16}}")


def signs_after(recipe: str, *overrides: str) -> dict[str, float]:
    """The last signs of a short run."""
    trainer = Trainer(recipes.load(recipe, [*SCENES, *overrides]), HERE)
    with closing(trainer.loader.batches(0)) as batches:
        seen = [next(batches) for _ in range(2)]
    for step in range(STEPS):
        trainer.stepper.step([seen[step % 2]], replace(trainer.clock, step=step), logged=True)
    return {name: float(value) for name, value in trainer.learner.signs().items()}


@pytest.fixture(scope="module")
def intact() -> dict[str, float]:
    return signs_after("dino-small", *DINO)


def test_dino_as_it_is_meant_spreads(intact: dict[str, float]):
    assert intact["dino/prototype_use"] > 0.5
    assert intact["dino/target_entropy"] < math.log(PROTOTYPES) - 0.2


def test_dino_without_centring_falls_onto_a_few_prototypes(intact: dict[str, float]):
    broken = signs_after("dino-small", *DINO, "objectives.dino.centre_momentum=0.9999999")  # stays at zero
    assert broken["dino/prototype_use"] < 4 / PROTOTYPES < intact["dino/prototype_use"]
    assert broken["dino/target_entropy"] < 1.0 < intact["dino/target_entropy"]


def test_dino_without_sharpening_says_the_same_of_everything(intact: dict[str, float]):
    broken = signs_after("dino-small", *DINO, "objectives.dino.teacher_temperature=1.0")
    assert broken["dino/target_entropy"] == pytest.approx(math.log(PROTOTYPES), abs=0.01)
    assert broken["dino/teacher_student_kl"] < 0.01 < intact["dino/teacher_student_kl"]
    assert broken["student_image/std"] < intact["student_image/std"] / 2


class OwnTeacher(Dino):
    """The student is its own teacher, centred and sharpened as ever; no gradient reaches the targets."""

    def requests(self) -> Sequence[Request]:
        return self.student

    def forward(self, batch: Batch, encoded: Encoded, at: At) -> dict[str, Tensor]:
        seen = torch.cat([encoded.image(request).cls for request in self.student])
        scores = self.head(seen.flatten(0, 1))
        large = encoded.image(self.student[0]).cls.shape[:2]
        taught = self.stopped(scores[: large.numel()])
        targets = self.targets(taught, at.teacher_temperature).unflatten(0, large)
        self.centre.observe(full_precision(taught.detach()))
        log_student = self.log_predictions(scores, at).unflatten(0, seen.shape[:2])
        loss = cross_entropy_of_other_crops(targets, log_student, large[0])
        self.signs = signs_of_collapse(targets.detach().flatten(0, 1), loss.detach())
        return {"dino": loss}

    def stopped(self, scores: Tensor) -> Tensor:
        return scores.detach()


class WithoutStopGradient(OwnTeacher):
    """The same, but the targets learn too."""

    def stopped(self, scores: Tensor) -> Tensor:
        return scores


def test_without_stop_gradient_alone_all_images_become_alike(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(registry._KINDS, "dino", OwnTeacher)
    stopped = signs_after("dino-small", *DINO)
    monkeypatch.setitem(registry._KINDS, "dino", WithoutStopGradient)
    broken = signs_after("dino-small", *DINO)
    assert broken["student_image/std"] < 0.2 < 0.4 < stopped["student_image/std"]
    assert broken["dino/target_entropy"] == pytest.approx(math.log(PROTOTYPES), abs=0.1)
    assert stopped["dino/target_entropy"] < 0.5 * math.log(PROTOTYPES)
