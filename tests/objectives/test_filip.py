"""FILIP against a plain transcription, and what counts as a word."""

import pytest
import torch
import torch.nn.functional as F
from parts import CLOCK, assert_same, batch_of, learner_of, losses_of

from harmony.objectives import filip
from harmony.objectives.filip import late_interaction


def test_filip():
    """Equations 4 to 6 of the paper, one pair of tokens at a time, each caption read alone and without padding."""
    learner = learner_of({"filip": {}})
    batch = batch_of(learner)
    pairs, tower = len(batch), learner.student.text
    patches, words = [], []
    for i in range(pairs):
        tokens = learner.student.image.encode(batch.images["global"][0, i : i + 1]).patches[0]
        patches.append([F.normalize(token @ learner.student.image.proj.weight.T, dim=0) for token in tokens])
        length = int((batch.captions["caption"][i] > 0).sum())
        read = tower.read(batch.captions["caption"][i : i + 1, :length]).tokens[0]
        projected = tower.transformer.ln_final(read) @ tower.transformer.text_projection
        words.append([F.normalize(token, dim=0) for token in projected])
    scale = learner.objectives["filip"].logit_scale.exp()
    losses = []
    for i in range(pairs):
        to_text = [torch.stack([max(p @ w for w in words[j]) for p in patches[i]]).mean() for j in range(pairs)]
        to_image = [torch.stack([max(p @ w for p in patches[j]) for w in words[i]]).mean() for j in range(pairs)]
        losses += [-(scale * torch.stack(row)).log_softmax(0)[i] / 2 for row in (to_text, to_image)]
    assert_same(losses_of(learner, batch)["filip"], torch.stack(losses).sum() / pairs, learner)


def test_padding_changes_nothing():
    learner = learner_of({"filip": {}})
    batch = batch_of(learner)
    expected = losses_of(learner, batch)["filip"]
    batch.captions["caption"] = F.pad(batch.captions["caption"], (0, 6))
    assert_same(losses_of(learner, batch)["filip"], expected, learner)


def test_tokens_compared_in_parts_give_the_same(monkeypatch: pytest.MonkeyPatch):
    learner = learner_of({"filip": {}})
    batch = batch_of(learner)
    whole = losses_of(learner, batch)["filip"]
    monkeypatch.setattr(filip, "TILE", 5 * 16 * 9 * 2)  # two of the five captions at a time
    assert_same(losses_of(learner, batch)["filip"], whole, learner)


def test_a_perfect_alignment_has_similarity_one_and_beats_others():
    tokens = F.normalize(torch.randn(3, 4, 8, dtype=torch.float64), dim=-1)
    counted = torch.tensor([[True] * 4, [True, True, False, False], [True] * 3 + [False]])
    similarity = late_interaction(tokens, counted, tokens[:, [2, 0, 3, 1]], None)
    assert torch.allclose(similarity.diagonal(), torch.ones(3, dtype=torch.float64))
    assert (similarity <= 1 + 1e-12).all() and (similarity - torch.eye(3) < 0.999).all()
    # A token that does not count is found by none.
    hidden = late_interaction(tokens, None, tokens, counted)
    assert float(hidden[1, 1]) < 1 and float(hidden[0, 0]) == pytest.approx(1)


def test_the_class_token_alone_is_left_to_clip():
    """Only clip trains the vector that zero_shot and retrieval compare, and both share their passes."""
    learner = learner_of({"filip": {}, "clip": {"weight": 0.1}})
    assert [group.objectives for group in learner.plan.groups] == [("filip", "clip")]
    assert len(learner.plan.groups[0].student.images) == len(learner.plan.groups[0].student.texts) == 1
    losses_of(learner, batch_of(learner))


def test_the_loss_falls_when_trained():
    learner = learner_of({"filip": {}})
    batch, losses = batch_of(learner), []
    optimiser = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(20):
        losses.append(losses_of(learner, batch)["filip"])
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
        learner.after_update(CLOCK, 0.99, torch.tensor(True))
    assert float(losses[-1].detach()) < 0.7 * float(losses[0].detach())
