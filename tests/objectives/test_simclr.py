"""SimCLR's NT-Xent against a plain transcription, its projector's norm against torch's, and what the signs say."""

import pytest
import torch
from parts import VIEWS, assert_same, batch_of, learner_of, losses_of
from torch import Tensor, nn

from harmony.errors import UserError
from harmony.models.projectors import JointBatchNorm, MlpConfig, ProjectorConfig, mlp

HEAD = {"hidden": 16, "output": 8, "layers": 3}


def plain_head(head: nn.Sequential, x: Tensor) -> Tensor:
    """A projector on (M, D), written out one module after the other."""
    for module in head:
        if isinstance(module, JointBatchNorm):
            mean = sum(x) / len(x)
            variance = sum((row - mean) ** 2 for row in x) / len(x)
            x = (x - mean) / (variance + 1e-5).sqrt()
            x = x if module.weight is None else x * module.weight + module.bias
        elif isinstance(module, nn.Linear):
            x = torch.stack([module.weight @ row + (0 if module.bias is None else module.bias) for row in x])
        else:
            x = x.clamp(min=0)
    return x


def crops_of(learner, batch, view: str = "global") -> list[Tensor]:
    """The student's class tokens of each crop, through plain passes."""
    return [learner.student.image.encode(crop).cls for crop in batch.images[view]]


@pytest.mark.parametrize("normed", ["together", "apart"])
@pytest.mark.parametrize("view", ["global", "local"])
def test_nt_xent(view: str, normed: str):
    """Two crops: equation 1. Three: every other crop of the image is a positive in turn."""
    learner = learner_of({"simclr": {"view": view, "head": HEAD, "temperature": 0.3, "normed": normed}})
    batch, head = batch_of(learner), learner.objectives["simclr"].head
    seen = crops_of(learner, batch, view)
    if normed == "apart":
        projected = torch.cat([plain_head(head, crop) for crop in seen])
    else:
        projected = plain_head(head, torch.cat(seen))
    z = [row / row.norm() for row in projected]
    images, terms = len(batch), []
    for i in range(len(z)):
        for j in range(len(z)):
            if i != j and i % images == j % images:
                others = torch.stack([z[i] @ z[k] / 0.3 for k in range(len(z)) if k != i])
                terms.append(-torch.log(torch.exp(z[i] @ z[j] / 0.3) / torch.exp(others).sum()))
    assert_same(losses_of(learner, batch)["simclr"], torch.stack(terms).mean(), learner)
    assert not learner.plan.teacher, "SimCLR asks the teacher for nothing"


def test_signs_tell_a_collapse_from_health():
    learner = learner_of({"simclr": {"head": HEAD | {"norm": "none"}}})
    objective, batch = learner.objectives["simclr"], batch_of(learner, examples=8)
    losses_of(learner, batch)
    healthy = learner.signs()
    assert 0 <= healthy["simclr/batch_accuracy"] <= 1
    assert healthy["simclr/negative_cosine"] < 0.999
    with torch.no_grad():
        objective.head[-1].weight.zero_()
    loss = losses_of(learner, batch)["simclr"]
    assert float(learner.signs()["simclr/negative_cosine"]) == pytest.approx(1)
    assert float(learner.signs()["simclr/positive_cosine"]) == pytest.approx(1)
    assert float(loss.detach()) == pytest.approx(torch.log(torch.tensor(15.0)).item()), "log of the other crops"


def test_the_loss_falls_when_crops_of_an_image_come_closer():
    learner = learner_of({"simclr": {"head": HEAD}})
    batch = batch_of(learner)
    apart = losses_of(learner, batch)["simclr"]
    batch.images["global"][1] = batch.images["global"][0] + 0.01 * batch.images["global"][1]
    assert losses_of(learner, batch)["simclr"] < apart


def test_one_crop_is_refused():
    with pytest.raises(UserError, match=r"views.plain.count=2"):
        learner_of({"simclr": {"view": "plain", "head": HEAD}})
    assert VIEWS["plain"].count == 1


@pytest.mark.parametrize("affine", [True, False])
def test_joint_batch_norm_is_torchs(affine: bool):
    ours, theirs = JointBatchNorm(5, affine).double(), nn.BatchNorm1d(5, affine=affine).double()
    if affine:
        with torch.no_grad():
            ours.weight.normal_(), ours.bias.normal_()
        theirs.load_state_dict(ours.state_dict(), strict=False)
    x = (3 + 2 * torch.randn(7, 5, dtype=torch.float64)).requires_grad_()
    weights = torch.randn(7, 5, dtype=torch.float64)
    assert torch.allclose(ours(x), theirs(x), rtol=1e-12)
    assert torch.allclose(ours.eval()(x), ours.train()(x)), "statistics are always the batch's"
    inputs = [x, *ours.parameters()]
    mine = torch.autograd.grad((ours(x) * weights).sum(), inputs)
    other = torch.autograd.grad((theirs(x) * weights).sum(), [x, *theirs.parameters()])
    for a, b in zip(mine, other, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_norm_is_in_full_precision_under_autocast():
    x = 100 + torch.randn(64, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = JointBatchNorm(4)(x)
    assert out.dtype == torch.float32 and torch.allclose(out.std(0, correction=0), torch.ones(4), atol=1e-3)


@pytest.mark.parametrize(("norm", "expected"), [("none", 0), ("hidden", 2), ("all", 3)])
def test_where_norms_are(norm: str, expected: int):
    made = mlp(6, MlpConfig(hidden=5, layers=3, norm=norm), 4)
    norms = [module for module in made if isinstance(module, JointBatchNorm)]
    linear = [module for module in made if isinstance(module, nn.Linear)]
    assert len(norms) == expected and [layer.out_features for layer in linear] == [5, 5, 4]
    assert [layer.bias is None for layer in linear] == [number < expected for number in range(3)]
    assert norm != "all" or norms[-1].weight is None
    assert isinstance(made[-1], JointBatchNorm if norm == "all" else nn.Linear)
    assert ProjectorConfig().norm == "hidden"
