"""SwAV against a plain transcription, its queue, and the prototypes' first epoch."""

from dataclasses import replace

import pytest
import torch
from parts import CLOCK, assert_same, batch_of, learner_of, losses_of
from torch import Tensor

from harmony.errors import UserError
from harmony.objectives.queues import Queue

SETTINGS = {
    "head": {"hidden": 16, "output": 8, "layers": 3},
    "prototypes": 6,
    "student_temperature": 0.2,
    "target_temperature": 0.3,
    "queue_after": 0,
}


def plain_sinkhorn(scores: Tensor, temperature: float, rounds: int) -> list[list[float]]:
    """Algorithm 1 of the paper on (M, K) scores, returned as M rows that add up to 1."""
    rows, columns = scores.shape
    q = [[float((scores[i, k] / temperature).exp()) for k in range(columns)] for i in range(rows)]
    for _ in range(rounds):
        used = [sum(row[k] for row in q) for k in range(columns)]
        q = [[row[k] / used[k] / columns for k in range(columns)] for row in q]
        q = [[value / sum(row) / rows for value in row] for row in q]
    return [[value * rows for value in row] for row in q]


@pytest.mark.parametrize("queue", [0, 7])
@pytest.mark.parametrize("local", ["local", None])
def test_swav(queue: int, local: str | None):
    learner = learner_of({"swav": SETTINGS | {"local_view": local, "queue": queue}})
    batch, swav = batch_of(learner), learner.objectives["swav"]
    for full in swav.queues:
        full.filled.fill_(7)
    ours = losses_of(learner, batch)["swav"]
    crops = [*batch.images["global"], *(batch.images["local"] if local else [])]
    seen = torch.cat([learner.student.image.encode(crop).cls for crop in crops])
    z = [row / row.norm() for row in swav.head(seen)]
    prototypes = [row / row.norm() for row in swav.prototypes.direction]
    scores = torch.stack([torch.stack([v @ c for c in prototypes]) for v in z]).unflatten(0, (len(crops), -1))
    terms = []
    for s in range(2):
        clustered = [scores[s].detach()]
        if queue:
            clustered.append(torch.stack([torch.stack([v @ c for c in prototypes]) for v in swav.queues[s].vectors]))
        targets = plain_sinkhorn(torch.cat(clustered).detach(), 0.3, 3)
        for t in range(len(crops)):
            for i in range(len(batch)):
                if s != t:
                    log = (scores[t, i] / 0.2).log_softmax(0)
                    terms.append(-sum(targets[i][k] * log[k] for k in range(6)))
    assert_same(ours, torch.stack(terms).mean(), learner)
    assert not learner.plan.teacher


def test_the_queue_holds_the_newest_projections_of_each_crop_and_waits_until_it_may_be_used():
    learner = learner_of({"swav": SETTINGS | {"queue": 7, "queue_after": "50 steps"}})
    batch, swav = batch_of(learner), learner.objectives["swav"]
    without = learner_of({"swav": SETTINGS})
    without.load_state_dict(learner.state_dict(), strict=False)
    first = losses_of(learner, batch)["swav"]
    assert torch.equal(first, losses_of(without, batch)["swav"]), "step 30 is too early"
    before = [queue.vectors.clone() for queue in swav.queues]
    learner.after_update(CLOCK, 1.0, torch.tensor(True))
    for crop, queue in enumerate(swav.queues):
        assert torch.equal(queue.vectors[5:], before[crop][:2])
        assert torch.allclose(queue.vectors.norm(dim=1), torch.ones(7, dtype=torch.float64))
    for queue in swav.queues:
        queue.filled.fill_(7)
    later = replace(CLOCK, step=60)
    with_queue, plain = (next(one.losses_by_group(batch, later)).losses["swav"] for one in (learner, without))
    assert abs(float((with_queue - plain).detach())) > 1e-6


@pytest.mark.parametrize(("parts", "steps"), [(1, 2), (2, 1)], ids=["two steps", "two parts of a step"])
def test_a_queue_with_random_vectors_left_in_it_is_not_used(parts: int, steps: int):
    learner = learner_of({"swav": SETTINGS | {"queue": 10}})
    without = learner_of({"swav": SETTINGS})
    without.load_state_dict(learner.state_dict(), strict=False)
    batch, plain = batch_of(learner, examples=5), losses_of(without, batch_of(learner, examples=5))["swav"]
    for seen in range(parts * steps):
        assert torch.allclose(losses_of(learner, batch)["swav"], plain, rtol=1e-12), f"{5 * seen} vectors of 10"
        if (seen + 1) % parts == 0:
            for queue in learner.objectives["swav"].queues:
                queue.update()
    for queue in learner.objectives["swav"].queues:
        assert queue.is_full()
        queue.vectors.neg_()  # or the batch would be clustered beside its own copies, which changes nothing
    assert abs(float((losses_of(learner, batch)["swav"] - plain).detach())) > 1e-6


def test_a_skipped_step_leaves_queues_and_prototypes_alone_to_the_last_bit():
    learner = learner_of({"swav": SETTINGS | {"queue": 7}})
    swav = learner.objectives["swav"]
    with torch.no_grad():
        swav.prototypes.direction.mul_(3)
    before = {name: tensor.clone() for name, tensor in swav.state_dict().items()}
    losses_of(learner, batch_of(learner))
    learner.after_update(CLOCK, 0.5, torch.tensor(False))
    assert all(torch.equal(tensor, before[name]) for name, tensor in swav.state_dict().items())
    losses_of(learner, batch_of(learner))
    learner.after_update(CLOCK, 0.5, torch.tensor(True))
    changed = {name for name, tensor in swav.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any("direction" in name for name in changed) and any("vectors" in name for name in changed)


def test_micro_batches_make_one_update_of_a_queue():
    queue, whole = Queue(6, 3), Queue(6, 3)
    whole.load_state_dict(queue.state_dict())
    before, vectors = queue.vectors.clone(), torch.randn(4, 3)
    for part in vectors.split(2):
        queue.observe(part)
        assert torch.equal(queue.vectors, before), "all micro-batches see the same queue"
    whole.observe(vectors)
    queue.update(), whole.update()
    assert torch.equal(queue.vectors, torch.cat([vectors, before[:2]])) and torch.equal(queue.vectors, whole.vectors)
    assert int(queue.filled) == 4 and not queue.is_full()
    queue.observe(torch.randn(9, 3))
    queue.update()
    assert queue.vectors.shape == (6, 3) and queue.is_full()


def test_prototypes_are_frozen_at_first_and_of_unit_length_always():
    learner = learner_of({"swav": SETTINGS | {"freeze_prototypes": "31 steps"}})
    swav = learner.objectives["swav"]
    for step, frozen in ((30, True), (31, False)):
        learner.zero_grad()
        losses_of(learner, batch_of(learner))["swav"].backward()
        learner.before_update(replace(CLOCK, step=step))
        assert (swav.prototypes.direction.grad is None) is frozen
        assert swav.head[0].weight.grad is not None
    with torch.no_grad():
        swav.prototypes.direction.mul_(3)
    learner.after_update(CLOCK, 1.0, torch.tensor(True))
    assert torch.allclose(swav.prototypes.direction.norm(dim=1), torch.ones(6, dtype=torch.float64))


def test_one_crop_is_refused():
    with pytest.raises(UserError, match=r"views.plain.count=2"):
        learner_of({"swav": SETTINGS | {"view": "plain", "local_view": None}})


def test_signs_see_that_targets_are_balanced():
    learner = learner_of({"swav": SETTINGS | {"iterations": 50}})
    losses_of(learner, batch_of(learner))
    assert float(learner.signs()["swav/prototype_use"]) == pytest.approx(1, abs=0.05)
