"""Label smoothing and changed captions, and that clip-strong is Harmony but for its objectives."""

import pytest
import torch
import torch.nn.functional as F
from parts import assert_same, batch_of, learner_of, losses_of

from harmony import recipe as recipes
from harmony.errors import UserError
from harmony.recipe import differences
from harmony.training.learner import build_learner


@pytest.mark.parametrize("hard", [1.0, 0.4])
def test_label_smoothing_is_pytorch_s_and_leaves_soft_targets_alone(hard: float):
    learner = learner_of({"clip": {"label_smoothing": 0.2, "hard_weight": hard}})
    batch, clip = batch_of(learner), learner.objectives["clip"]

    def both(towers):
        image = F.normalize(towers.image(batch.images["global"][0]), dim=-1)
        return image @ F.normalize(towers.text(batch.captions["caption"]), dim=-1).T

    logits, slow = clip.logit_scale.exp() * both(learner.student), both(learner.teacher).detach() / 0.1
    own = torch.arange(len(batch))
    expected = sum(
        hard * F.cross_entropy(ours, own, label_smoothing=0.2)
        + (1 - hard) * -(theirs.softmax(1) * ours.log_softmax(1)).sum(1).mean()
        for ours, theirs in ((logits, slow), (logits.T, slow.T))
    )
    assert_same(losses_of(learner, batch)["clip"], expected / 2, learner)


def test_a_rank_smooths_over_the_pairs_of_all_ranks(monkeypatch: pytest.MonkeyPatch):
    from harmony import ranks

    clip = learner_of({"clip": {"label_smoothing": 0.3}}).objectives["clip"]
    monkeypatch.setattr(ranks, "count", lambda: 3)
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    targets, _ = clip.hard_targets(torch.zeros(2, 5, dtype=torch.float64))
    expected = torch.full((2, 6), 0.3 / 6, dtype=torch.float64)
    expected[0, 2] += 0.7
    expected[1, 3] += 0.7
    assert torch.allclose(targets, expected)


def test_a_sigmoid_has_no_labels_to_smooth():
    with pytest.raises(UserError, match=r"label_smoothing .* set it to 0"):
        recipes.resolve("siglip-small", ["objectives.siglip.label_smoothing=0.1"])


def test_clip_strong_is_harmony_but_for_its_objectives_and_what_feeds_them():
    strong, harmony = recipes.resolve("clip-strong"), recipes.resolve("harmony")
    changed = {key.partition(".")[0] for key in differences(strong, harmony)}
    assert changed == {"data", "views", "objectives"}
    assert [key for key in differences(strong, harmony) if key.startswith("data")] == [
        "data.caption_augment.delete", "data.caption_augment.swap", "data.caption_augment"
    ]  # fmt: skip
    assert strong.views["global"].looks == harmony.views["global"].looks[:1]
    assert strong.views["global"].scale == harmony.views["global"].scale
    assert list(strong.objectives) == ["clip"]
    assert not build_learner(recipes.resolve("clip-strong-small")).plan.teacher, "nothing is asked of the teacher"
