"""MaskCLIP's masked self-distillation against a plain transcription, one image and one patch at a time."""

import pytest
import torch
from parts import CLOCK, HEAD, assert_same, batch_of, learner_of, losses_of
from torch import Tensor

from harmony import recipe as recipes
from harmony.errors import UserError
from harmony.models.vision import Segment
from harmony.training.learner import build_learner

SETTINGS = {"head": HEAD, "mask_ratio": 0.6, "teacher_temperature": 0.05}


def code(head, token: Tensor) -> Tensor:
    """The head on one token, written out."""
    hidden = head.mlp(token)
    directions = head.prototypes.direction
    return (directions / directions.norm(dim=1, keepdim=True)) @ (hidden / hidden.norm())


def test_masked_distillation():
    learner = learner_of({"masked_distillation": SETTINGS})
    objective = learner.objectives["masked_distillation"]
    batch, decoder = batch_of(learner, examples=3), objective.decoder
    objective.centre.mean.normal_(std=0.1)
    centre = objective.centre.mean.clone()
    ours = losses_of(learner, batch)["masked_distillation"]
    masked = batch.masks["masked_distillation"].masked
    terms, scores = [], []
    for v in range(2):
        for i in range(3):
            image = batch.images["global"][v, i : i + 1]
            hidden = [n for n in range(16) if masked[v, i, n]]
            visible = [n for n in range(16) if not masked[v, i, n]]
            assert len(hidden) == 16 - int(16 * 0.4)
            tokens = learner.student.image.encode_packed([Segment(image, keep=torch.tensor([visible]))])[0].tokens[0]
            row = [tokens[0]]
            row += [tokens[1 + visible.index(n)] if n in visible else decoder.mask_token for n in range(16)]
            [block] = decoder.blocks
            decoded = block((torch.stack(row) + decoder.positions[0])[None])[0]
            slow = learner.teacher.image.encode(image).patches[0]
            for n in hidden:
                scores.append(code(objective.teacher_head, slow[n]).detach())
                target = ((scores[-1] - centre) / 0.05).softmax(0)
                terms.append(
                    -(target * (code(objective.head, decoder.norm(decoded[1 + n])) / 0.1).log_softmax(0)).sum()
                )
    assert_same(ours, torch.stack(terms).mean(), learner)
    learner.after_update(CLOCK, 1.0, torch.tensor(True))
    assert torch.allclose(objective.centre.mean, 0.9 * centre + 0.1 * torch.stack(scores).mean(0))


def test_only_removed_patches_and_only_through_the_decoder_are_predicted():
    """What the student does not see has no influence on it; what the teacher sees there has."""
    learner = learner_of({"masked_distillation": SETTINGS})
    batch, objective = batch_of(learner, examples=2), learner.objectives["masked_distillation"]
    losses_of(learner, batch)["masked_distillation"].backward()
    assert objective.decoder.mask_token.grad.norm() > 0
    assert learner.student.image.mask_token.grad is None, "the encoder meets no mask token"
    assert all(p.grad is None for p in (*learner.teacher.parameters(), *objective.teacher_head.parameters()))


def test_a_student_that_learns_its_targets_loses_less():
    learner = learner_of({"masked_distillation": SETTINGS})
    batch = batch_of(learner)
    weights = [p for p in learner.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(weights, lr=3e-3)
    losses = []
    for _ in range(15):
        optimiser.zero_grad()
        loss = losses_of(learner, batch)["masked_distillation"]
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    entropy = learner.signs()["masked_distillation/target_entropy"].item()
    assert losses[-1] - entropy < 0.5 * (losses[0] - entropy)


def test_a_skipped_step_and_balanced_targets():
    learner = learner_of({"masked_distillation": SETTINGS | {"centring": "sinkhorn_knopp"}})
    objective, batch = learner.objectives["masked_distillation"], batch_of(learner, examples=8)
    losses_of(learner, batch)
    # Balanced targets use each of the 24 prototypes for a like share of the 160 patches.
    assert learner.signs()["masked_distillation/prototype_use"].item() > 0.8
    learner.after_update(CLOCK, 1.0, torch.tensor(False))
    learner.after_update(CLOCK, 1.0, torch.tensor(True))
    assert torch.equal(objective.centre.mean, torch.zeros(24))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [("{mask_ratio: 0.99}", "keeps 0 of the 25 patches"), ("{decoder: {heads: 5}}", "set decoder.heads to null")],
)
def test_what_cannot_be_built_is_refused(wrong: str, told: str):
    with pytest.raises(UserError, match=told):
        build_learner(recipes.resolve("maskclip-small", [f"objectives.masked_distillation={wrong}"]))
