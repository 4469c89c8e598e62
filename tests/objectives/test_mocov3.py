"""MoCo v3 against a plain transcription, and its queue."""

import pytest
import torch
from parts import CLOCK, assert_same, batch_of, learner_of, losses_of
from torch import Tensor

from harmony.errors import UserError
from harmony.models.projectors import JointBatchNorm

SETTINGS = {
    "head": {"hidden": 16, "output": 8, "layers": 3, "norm": "all"},
    "predictor": {"hidden": 16, "layers": 2, "norm": "all"},
    "temperature": 0.3,
}


def queries_and_keys(learner, batch) -> tuple[list[Tensor], list[Tensor]]:
    """Unit vectors of both crops, through plain passes."""
    objective = learner.objectives["mocov3"]
    queries, keys = [], []
    for crop in batch.images["global"]:
        q = objective.predictor(objective.head(learner.student.image.encode(crop).cls))
        k = objective.teacher_head(learner.teacher.image.encode(crop).cls).detach()
        queries.append(torch.stack([row / row.norm() for row in q]))
        keys.append(torch.stack([row / row.norm() for row in k]))
    return queries, keys


@pytest.mark.parametrize("queue", [0, 7])
def test_mocov3(queue: int):
    learner = learner_of({"mocov3": SETTINGS | {"queue": queue}})
    batch = batch_of(learner)
    (q1, q2), (k1, k2) = queries_and_keys(learner, batch)
    total: Tensor = torch.zeros((), dtype=torch.float64)
    for q, k in ((q1, k2), (q2, k1)):
        for i in range(len(batch)):
            positive = torch.exp(q[i] @ k[i] / 0.3)
            if queue:
                negatives = [torch.exp(q[i] @ old / 0.3) for old in learner.objectives["mocov3"].queue.vectors]
            else:
                negatives = [torch.exp(q[i] @ k[j] / 0.3) for j in range(len(batch)) if j != i]
            total = total - 2 * 0.3 * torch.log(positive / (positive + sum(negatives))) / len(batch)
    assert_same(losses_of(learner, batch)["mocov3"], total, learner)
    assert 0 <= float(learner.signs()["mocov3/batch_accuracy"]) <= 1


def test_no_gradient_reaches_the_teacher():
    learner = learner_of({"mocov3": SETTINGS})
    losses_of(learner, batch_of(learner))["mocov3"].backward()
    slow = [*learner.teacher.parameters(), *learner.objectives["mocov3"].teacher_head.parameters()]
    assert all(p.grad is None for p in slow)


def test_the_queue_takes_the_keys_of_both_crops_after_the_update():
    learner = learner_of({"mocov3": SETTINGS | {"queue": 12}})
    batch, queue = batch_of(learner), learner.objectives["mocov3"].queue
    before = queue.vectors.clone()
    losses_of(learner, batch)
    _, (k1, k2) = queries_and_keys(learner, batch)
    assert torch.equal(queue.vectors, before)
    learner.after_update(CLOCK, 1.0, torch.tensor(False)), learner.after_update(CLOCK, 1.0, torch.tensor(True))
    assert torch.equal(queue.vectors, before), "a skipped step leaves it alone"
    losses_of(learner, batch)
    learner.after_update(CLOCK, 1.0, torch.tensor(True))
    expected = torch.stack([k1, k2], dim=1).flatten(0, 1)
    assert torch.allclose(queue.vectors[:10], expected) and torch.equal(queue.vectors[10:], before[:2])


def test_the_loss_falls_as_queries_come_to_their_keys():
    objective = learner_of({"mocov3": SETTINGS}).objectives["mocov3"]
    keys = torch.nn.functional.normalize(torch.randn(6, 8, dtype=torch.float64), dim=1)
    own = objective.places(6, keys.device)
    losses = []
    for noise in (2.0, 0.5, 0.0):
        queries = torch.nn.functional.normalize(keys + noise * torch.randn_like(keys), dim=1)
        losses.append(float(torch.nn.functional.cross_entropy(objective.similarities(queries, keys) / 0.1, own)))
    assert losses == sorted(losses, reverse=True)


def test_the_slow_projector_normalises_by_its_own_batch():
    learner = learner_of({"mocov3": SETTINGS})
    head = learner.objectives["mocov3"].teacher_head
    assert not head.training and isinstance(head[-1], JointBatchNorm)
    out = head(torch.randn(9, 16, dtype=torch.float64))
    assert torch.allclose(out.mean(0), torch.zeros(8, dtype=torch.float64), atol=1e-9)


def test_one_crop_is_refused():
    with pytest.raises(UserError, match=r"views.plain.count=2"):
        learner_of({"mocov3": SETTINGS | {"view": "plain"}})
