"""What SILC asks of two objectives: CLIP on several crops, and DINO whose student sees small crops alone."""

import pytest
import torch
import torch.nn.functional as F
from open_clip import ClipLoss
from parts import HEAD, assert_same, batch_of, learner_of, losses_of

from harmony import recipe as recipes
from harmony.errors import UserError
from harmony.objectives.base import ImageRequest
from harmony.training.learner import build_learner


def test_each_crop_meets_the_caption_for_itself():
    learner = learner_of({"clip": {"crops": 2}})
    batch = batch_of(learner)
    text = F.normalize(learner.student.text(batch.captions["caption"]), dim=-1)
    scale = learner.objectives["clip"].logit_scale.exp()
    crops = [F.normalize(learner.student.image(batch.images["global"][v]), dim=-1) for v in range(2)]
    assert_same(losses_of(learner, batch)["clip"], sum(ClipLoss()(crop, text, scale) for crop in crops) / 2, learner)


def test_soft_targets_are_those_of_the_same_crop():
    one, both = learner_of({"clip": {"hard_weight": 0.3}}), learner_of({"clip": {"hard_weight": 0.3, "crops": 2}})
    batch = batch_of(one)
    first = losses_of(one, batch)["clip"]
    batch.images["global"] = batch.images["global"].flip(0)
    second = losses_of(one, batch)["clip"]
    assert losses_of(both, batch)["clip"].item() == pytest.approx((first + second).item() / 2, rel=1e-12)


def test_small_crops_predict_how_the_teacher_sees_large_ones():
    learner = learner_of({"dino": {"head": HEAD, "student_sees": "local", "teacher_temperature": 0.05}})
    batch, dino = batch_of(learner), learner.objectives["dino"]
    dino.centre.mean.normal_(std=0.1)
    terms = []
    for large in batch.images["global"]:
        slow = dino.teacher_head(learner.teacher.image.encode(large).cls)
        targets = ((slow - dino.centre.mean) / 0.05).softmax(-1).detach()
        for small in batch.images["local"]:
            scores = dino.head(learner.student.image.encode(small).cls) / 0.1
            terms += [-(targets[i] * scores[i].log_softmax(0)).sum() for i in range(len(batch))]
    assert len(terms) == 2 * 3 * len(batch)
    assert_same(losses_of(learner, batch)["dino"], torch.stack(terms).mean(), learner)


def test_the_student_of_silc_encodes_no_large_crop_but_for_its_captions():
    learner = build_learner(recipes.resolve("silc-small"))
    passes = [request for group in learner.plan.groups for request in group.student.images]
    by_view = {request.view: group.objectives for group in learner.plan.groups for request in group.student.images}
    assert by_view == {"global": ("clip",), "local": ("dino",)} and len(passes) == 2
    assert [request.view for request in learner.plan.teacher.images] == ["global"]
    assert ImageRequest("global") not in learner.objectives["dino"].requests()


@pytest.mark.parametrize("wrong", ["local_view: null", "mask: block", "keep: block"])
def test_settings_that_contradict_each_other_are_refused(wrong: str):
    with pytest.raises(UserError, match="student_sees: local"):
        recipes.resolve("silc-small", [f"objectives.dino={{{wrong}}}"])
