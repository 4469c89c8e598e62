"""KoLeo against a plain transcription, its properties, and its place in DINOv2."""

import math

import pytest
import torch
import torch.nn.functional as F
from parts import HEAD, assert_same, batch_of, learner_of, losses_of
from torch import Tensor

from harmony import recipe as recipes
from harmony.models.vision import Segment
from harmony.objectives.base import ImageRequest
from harmony.objectives.koleo import squared_gaps
from harmony.training.learner import build_learner


def plain(features: Tensor) -> Tensor:
    """-(1 / B) sum_i log min_j |x_i - x_j|, of (B, D), distances floored as the objective states it."""
    unit = [x / x.norm() for x in features]
    losses = []
    for i, x in enumerate(unit):
        gaps = [((x - y).square().sum() + 1e-8).sqrt() for j, y in enumerate(unit) if j != i]
        losses.append(-min(gaps, key=lambda gap: gap.item()).log())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("masked", [False, True])
def test_koleo(masked: bool):
    learner = learner_of({"ibot": {"head": HEAD, "weight": 0}, "koleo": {"mask": "block" if masked else None}})
    batch = batch_of(learner)
    hidden = batch.masks["block"].masked if masked else [None, None]
    crops = [Segment(batch.images["global"][v], replace=hidden[v]) for v in range(2)]
    terms = [plain(learner.student.image.encode_packed([crop])[0].cls) for crop in crops]
    assert_same(losses_of(learner, batch)["koleo"], torch.stack(terms).mean(), learner)


def test_descent_moves_neighbours_apart():
    torch.manual_seed(0)
    points = F.normalize(torch.randn(6, 3, dtype=torch.float64), dim=-1)
    before = squared_gaps(points)
    for _ in range(100):
        points.requires_grad_()
        [gradient] = torch.autograd.grad(-squared_gaps(points).log().mean(), points)
        points = F.normalize((points - 0.02 * gradient).detach(), dim=-1)
    # The best that six points can have is 2, in an octahedron.
    assert before.min().item() < 1 and squared_gaps(points.detach()).min().item() > 1.5


def test_equal_images_and_a_single_one_have_finite_losses_and_gradients():
    for features in (torch.ones(3, 4) / 2, torch.ones(1, 4) / 2):
        features.requires_grad_()
        loss = -0.5 * squared_gaps(features).log().mean()
        [gradient] = torch.autograd.grad(loss, features)
        assert loss.isfinite() and gradient.isfinite().all()
    assert float(loss.detach()) == 0


def test_it_is_the_loss_of_collapse():
    spread, close = torch.eye(4), F.normalize(torch.ones(4, 4) + 1e-3 * torch.eye(4), dim=-1)
    assert float(squared_gaps(spread).min()) == pytest.approx(2)
    assert -0.5 * float(squared_gaps(close).log().mean()) > 5


def test_dinov2_encodes_its_large_crops_once_for_all_three_and_has_a_head_for_each():
    learner = build_learner(recipes.resolve("dinov2-small"))
    [group] = learner.plan.groups
    assert group.objectives == ("dino", "ibot", "koleo")
    assert [(r.view, r.replace) for r in group.student.images] == [("global", "block"), ("local", None)]
    assert ImageRequest("global", replace="block", pooled=True) in learner.objectives["koleo"].requests()
    heads = [learner.objectives[name].head for name in ("dino", "ibot")]
    assert heads[0] is not heads[1] and learner.objectives["ibot"].lender is None


def test_the_paper_s_learning_rate():
    recipe = recipes.resolve("dinov2")
    assert math.isclose(recipe.optim.lr * recipe.data.batch_size / 256, 3.5e-4, rel_tol=1e-4)
