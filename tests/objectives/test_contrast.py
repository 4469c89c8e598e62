"""CLIP and SigLIP against open_clip's losses (values and gradients) and, with soft targets, a plain transcription."""

import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import SigLipLoss
from parts import CLOCK, assert_same, batch_of, learner_of, losses_of
from torch import Tensor


def features(learner, batch) -> tuple[Tensor, Tensor]:
    """Unit vectors of both student towers, through plain passes."""
    image = learner.student.image(batch.images["global"][0])
    text = learner.student.text(batch.captions["caption"])
    return F.normalize(image, dim=-1), F.normalize(text, dim=-1)


def test_hard_clip_is_open_clips_loss():
    learner = learner_of({"clip": {}})
    batch = batch_of(learner)
    ours = losses_of(learner, batch)["clip"]
    theirs = open_clip.ClipLoss()(*features(learner, batch), learner.objectives["clip"].logit_scale.exp())
    assert_same(ours, theirs, learner)
    assert not learner.plan.teacher, "plain CLIP asks the teacher for nothing"


def test_hard_siglip_is_open_clips_loss():
    learner = learner_of({"siglip": {}})
    batch = batch_of(learner)
    objective = learner.objectives["siglip"]
    theirs = SigLipLoss()(*features(learner, batch), objective.logit_scale.exp(), objective.logit_bias)
    assert_same(losses_of(learner, batch)["siglip"], theirs, learner)


@pytest.mark.parametrize("hard", [0.0, 0.4])
def test_soft_clip(hard: float):
    learner = learner_of({"clip": {"hard_weight": hard, "soft_temperature": 0.2}})
    batch = batch_of(learner)
    image, text = features(learner, batch)
    slow_image = F.normalize(learner.teacher.image(batch.images["global"][0]), dim=-1)
    slow_text = F.normalize(learner.teacher.text(batch.captions["caption"]), dim=-1)
    scale = learner.objectives["clip"].logit_scale.exp()
    total: Tensor = torch.zeros((), dtype=torch.float64)
    pairs = len(batch)
    for ours, others, slow, slow_others in ((image, text, slow_image, slow_text), (text, image, slow_text, slow_image)):
        for i in range(pairs):
            logits = torch.stack([scale * ours[i] @ others[j] for j in range(pairs)])
            soft = torch.stack([slow[i] @ slow_others[j] / 0.2 for j in range(pairs)]).softmax(0)
            log = logits.log_softmax(0)
            total = total - (hard * log[i] + (1 - hard) * (soft * log).sum()) / (2 * pairs)
    assert_same(losses_of(learner, batch)["clip"], total, learner)


def test_soft_siglip():
    learner = learner_of({"siglip": {"hard_weight": 0.3}})
    batch = batch_of(learner)
    image, text = features(learner, batch)
    slow_image = F.normalize(learner.teacher.image(batch.images["global"][0]), dim=-1)
    slow_text = F.normalize(learner.teacher.text(batch.captions["caption"]), dim=-1)
    objective, pairs = learner.objectives["siglip"], len(batch)
    slow = slow_image @ slow_text.T / 0.1
    total: Tensor = torch.zeros((), dtype=torch.float64)
    for i in range(pairs):
        for j in range(pairs):
            logit = objective.logit_scale.exp() * (image[i] @ text[j]) + objective.logit_bias
            soft = (slow[i].softmax(0)[j] + slow[:, j].softmax(0)[i]) / 2
            target = 0.3 * float(i == j) + 0.7 * soft
            total = total - (target * F.logsigmoid(logit) + (1 - target) * F.logsigmoid(-logit)) / pairs
    assert_same(losses_of(learner, batch)["siglip"], total, learner)


def test_no_gradient_reaches_the_teacher():
    learner = learner_of({"clip": {"hard_weight": 0.0}})
    losses_of(learner, batch_of(learner))["clip"].backward()
    assert all(p.grad is None for p in learner.teacher.parameters())


@pytest.mark.parametrize("name", ["clip", "filip"])
def test_the_scale_stays_below_its_bound_and_can_leave_it(name: str):
    learner = learner_of({name: {}})
    batch, objective = batch_of(learner), learner.objectives[name]
    with torch.no_grad():
        objective.logit_scale.fill_(math.log(500.0))
    learner.after_update(CLOCK, 1.0, torch.tensor(True))
    assert float(objective.logit_scale.detach()) == pytest.approx(math.log(100.0), rel=1e-12)
    losses_of(learner, batch)[name].backward()
    assert abs(float(objective.logit_scale.grad)) > 1e-3, "random towers want a smaller scale"


@pytest.mark.parametrize("name", ["clip", "filip"])
def test_a_scale_that_begins_above_its_bound_begins_at_it(name: str):
    learner = learner_of({name: {"initial_scale": 50.0, "max_scale": 20.0}})
    assert float(learner.objectives[name].logit_scale.detach()) == pytest.approx(math.log(20.0), rel=1e-6)


def test_signs():
    learner = learner_of({"clip": {}})
    losses_of(learner, batch_of(learner))
    signs = learner.signs()
    assert float(signs["clip/temperature"]) == pytest.approx(0.07, rel=1e-6)
    assert 0 <= float(signs["clip/batch_accuracy"]) <= 1
