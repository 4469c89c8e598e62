"""I-JEPA against a plain transcription, and what its targets are."""

import pytest
import torch
from parts import CLOCK, assert_same, batch_of, gradients, learner_of, losses_of

from harmony.errors import UserError
from harmony.models.vision import Segment
from harmony.objectives.ijepa import taken

PREDICTOR = {"width": 16, "depth": 2, "heads": 2}
IJEPA = {"ijepa": {"predictor": PREDICTOR}}


@pytest.mark.parametrize("loss", ["smooth_l1", "squared"])
def test_ijepa(loss: str):
    """One target block of one crop at a time, one place at a time."""
    learner = learner_of({"ijepa": {"predictor": PREDICTOR, "loss": loss}})
    batch, ijepa = batch_of(learner, examples=3), learner.objectives["ijepa"]
    ours = losses_of(learner, batch)["ijepa"]
    predictor, mask = ijepa.predictor, batch.masks["multi_block"]
    terms = []
    for v in range(2):
        for i in range(3):
            image = batch.images["global"][v, i : i + 1]
            context = [n for n in range(16) if not mask.masked[v, i, n]]
            seen = learner.student.image.encode_packed([Segment(image, keep=torch.tensor([context]))])[0].tokens[0]
            embedded = predictor.embed(seen)
            with torch.no_grad():
                whole = learner.teacher.image.encode(image).patches[0]
            for block in mask.blocks[v, i].tolist():
                sequence = [embedded[0]]
                sequence += [embedded[1 + k] + predictor.positions[1 + n] for k, n in enumerate(context)]
                sequence += [predictor.mask_token + predictor.positions[1 + n] for n in block]
                x = torch.stack(sequence)[None]
                for layer in predictor.blocks:
                    x = layer(x)
                features = predictor.features(predictor.norm(x))[0, -len(block) :]
                for n, feature in zip(block, features, strict=True):
                    target = (whole[n] - whole[n].mean()) / (whole[n].var(unbiased=False) + 1e-5).sqrt()
                    error = (feature - target).abs()
                    smooth = torch.where(error < 1, error**2 / 2, error - 0.5)
                    terms.append((smooth if loss == "smooth_l1" else error**2).mean())
    assert_same(ours, torch.stack(terms).mean(), learner)


def test_a_hidden_patch_moves_the_target_and_not_the_prediction():
    learner = learner_of(IJEPA)
    batch = batch_of(learner, examples=1)
    mask, seen = batch.masks["multi_block"], []
    learner.objectives["ijepa"].predictor.register_forward_hook(lambda _m, _i, out: seen.append(out.detach()))
    before = losses_of(learner, batch)["ijepa"]
    place = int(mask.blocks[0, 0, 0, 0])
    row, column = divmod(place, 4)
    batch.images["global"][0, 0, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] += 1
    after = losses_of(learner, batch)["ijepa"]
    assert torch.equal(*seen) and float(before.detach()) != float(after.detach())


def test_predictions_depend_on_the_place_asked_for():
    predictor = learner_of(IJEPA).objectives["ijepa"].predictor
    tokens, kept = torch.randn(2, 4, 16, dtype=torch.float64), torch.tensor([[1, 2, 9], [0, 5, 6]])
    blocks = torch.tensor([[[3, 4], [3, 4], [7, 4]], [[3, 4], [10, 11], [3, 4]]])
    predicted = predictor(tokens, 1, kept, blocks)
    assert predicted.shape == (2, 3, 2, 16)
    assert torch.equal(predicted[0, 0], predicted[0, 1]) and torch.equal(predicted[1, 0], predicted[1, 2])
    assert not torch.allclose(predicted[0, 0], predicted[0, 2])
    # Blocks are predicted apart: what else is asked for changes nothing.
    assert torch.allclose(predictor(tokens[:1], 1, kept[:1], blocks[:1, 2:])[0, 0], predicted[0, 2], rtol=1e-10)


def test_a_perfect_prediction_has_no_loss_and_the_teacher_gets_no_gradient():
    learner = learner_of(IJEPA)
    batch, ijepa = batch_of(learner), learner.objectives["ijepa"]
    loss = losses_of(learner, batch)["ijepa"]
    loss.backward()
    assert all(p.grad is None for p in learner.teacher.parameters())
    with torch.no_grad():
        teacher = learner.teacher.image.encode(batch.images["global"].flatten(0, 1)).patches.unflatten(0, (2, -1))
    targets = taken(ijepa.features(teacher), batch.masks["multi_block"].blocks)
    ijepa.predictor.forward = lambda *_: targets
    assert float(losses_of(learner, batch)["ijepa"].detach()) == 0


def test_the_sign_falls_to_zero_when_all_patches_are_alike():
    learner = learner_of(IJEPA)
    batch = batch_of(learner)
    losses_of(learner, batch)
    assert 0.1 < float(learner.signs()["ijepa/target_spread"]) < 1.01
    with torch.no_grad():
        learner.teacher.image.trunk.norm.weight.zero_()
        learner.teacher.image.trunk.norm.bias.normal_()
    losses_of(learner, batch)
    assert float(learner.signs()["ijepa/target_spread"]) < 1e-6


def test_a_joint_plan_has_the_same_gradients():
    found = []
    for joint in (False, True):
        learner = learner_of(IJEPA | {"mae": {"decoder": PREDICTOR}}, joint, drop_path=0.3)
        total = sum(losses_of(learner, batch_of(learner)).values())
        found.append(gradients(total, learner))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_loss_falls_when_trained():
    learner = learner_of(IJEPA)
    batch = batch_of(learner)
    optimiser = torch.optim.AdamW(learner.parts()["image"] + learner.parts()["ijepa"], lr=1e-2)
    losses = []
    for _ in range(30):
        [group] = learner.losses_by_group(batch, CLOCK)
        losses.append(float(group.total().detach()))
        optimiser.zero_grad()
        group.total().backward()
        optimiser.step()
    assert losses[-1] < 0.85 * losses[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"masks": "random"}, "has none; set its masks to multi_block"),
        ({"masks": {"multi_block": {"scale": [0.5, 1.0]}}}, "may leave nothing of the context"),
    ],
)
def test_masks_that_do_not_fit_are_refused(settings: dict, words: str):
    with pytest.raises(UserError, match=words):
        learner_of({"ijepa": {"predictor": PREDICTOR} | settings})
