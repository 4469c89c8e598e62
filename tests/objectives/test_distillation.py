"""DINO, iBOT and text distillation against plain transcriptions of their papers, one crop and one token at a time."""

import decimal
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from parts import CLOCK, HEAD, assert_same, batch_of, learner_of, losses_of
from torch import Tensor

from harmony.data.batch import Mask
from harmony.models.heads import HeadConfig, PrototypeHead
from harmony.models.vision import Segment
from harmony.objectives.targets import Centre, sinkhorn_knopp
from harmony.training.optimiser import decays


def head_scores(head, token: Tensor) -> Tensor:
    """The head on one token, written out."""
    hidden = head.mlp(token)
    hidden = hidden / hidden.norm()
    directions = head.prototypes.direction
    return (directions / directions.norm(dim=1, keepdim=True)) @ hidden


@pytest.mark.parametrize("mask", [None, "block"])
def test_dino(mask: str | None):
    objectives = {"dino": {"head": HEAD, "mask": mask, "student_temperature": 0.2, "teacher_temperature": 0.05}}
    learner = learner_of(objectives | ({"ibot": {"head": "dino", "weight": 0}} if mask else {}))
    batch, dino = batch_of(learner), learner.objectives["dino"]
    dino.centre.mean.normal_(std=0.1)
    centre = dino.centre.mean.clone()
    ours = losses_of(learner, batch)["dino"]
    large, small = batch.images["global"], batch.images["local"]
    hidden = [batch.masks["block"].masked[v] if mask else None for v in range(2)]
    student = [learner.student.image.encode_packed([Segment(large[v], replace=hidden[v])])[0].cls for v in range(2)]
    student += [learner.student.image.encode(small[v]).cls for v in range(3)]
    teacher = [learner.teacher.image.encode(large[v]).cls for v in range(2)]
    terms = []
    for t in range(2):
        for s in range(5):
            if t == s:
                continue
            for i in range(len(batch)):
                target = ((head_scores(dino.teacher_head, teacher[t][i]) - centre) / 0.05).softmax(0).detach()
                terms.append(-(target * (head_scores(dino.head, student[s][i]) / 0.2).log_softmax(0)).sum())
    assert_same(ours, torch.stack(terms).mean(), learner)
    expected = torch.stack([head_scores(dino.teacher_head, teacher[t][i]) for t in range(2) for i in range(5)]).mean(0)
    learner.after_update(CLOCK, 1.0, torch.tensor(True))
    assert torch.allclose(dino.centre.mean, 0.9 * centre + 0.1 * expected)


@pytest.mark.parametrize("borrowed", [True, False])
def test_ibot(borrowed: bool):
    objectives = {"dino": {"head": HEAD, "weight": 0}, "ibot": {"head": "dino" if borrowed else HEAD}}
    learner = learner_of(objectives)
    batch, ibot = batch_of(learner), learner.objectives["ibot"]
    owner = learner.objectives["dino"] if borrowed else ibot
    ibot.centre.mean.normal_(std=0.1)
    centre = ibot.centre.mean.clone()
    masked = batch.masks["block"].masked
    masked[0, 0] = False  # an image with nothing masked adds zero
    masked[1, 0, :3] = True
    batch.masks["block"] = Mask.of(masked)
    ours = losses_of(learner, batch)["ibot"]
    temperature = 0.04 + 0.03 * 3 / 5  # epoch 3 of the 5 of its warm-up
    total: Tensor = torch.zeros((), dtype=torch.float64)
    scores = []
    for v in range(2):
        student = learner.student.image.encode_packed([Segment(batch.images["global"][v], replace=masked[v])])[
            0
        ].patches
        teacher = learner.teacher.image.encode(batch.images["global"][v]).patches
        for i in range(len(batch)):
            hidden = [n for n in range(16) if masked[v, i, n]]
            for n in hidden:
                target = ((head_scores(owner.teacher_head, teacher[i, n]) - centre) / temperature).softmax(0).detach()
                log = (head_scores(owner.head, student[i, n]) / 0.1).log_softmax(0)
                total = total - (target * log).sum() / (len(hidden) * len(batch) * 2)
            scores += [head_scores(owner.teacher_head, teacher[i, n]) for n in range(16)]
    assert_same(ours, total, learner)
    learner.after_update(CLOCK, 1.0, torch.tensor(True))
    assert torch.allclose(ibot.centre.mean, 0.9 * centre + 0.1 * torch.stack(scores).mean(0))


def test_text_distillation():
    learner = learner_of({"mlm": {"weight": 0}, "text_distillation": {"head": HEAD}})
    batch, objective = batch_of(learner), learner.objectives["text_distillation"]
    objective.centre.mean.normal_(std=0.1)
    centre = objective.centre.mean.clone()
    ours = losses_of(learner, batch)["text_distillation"]
    captions, hidden = batch.captions["caption"], batch.masks["words"].masked
    student = learner.student.text.read(captions, hidden, "bidirectional").tokens
    teacher = learner.teacher.text.read(captions).tokens
    temperature = 0.04 + 0.03 * 3 / 5
    total: Tensor = torch.zeros((), dtype=torch.float64)
    scores = []
    for i in range(len(batch)):
        places = hidden[i].nonzero()[:, 0].tolist()
        for t in places:
            target = ((head_scores(objective.teacher_head, teacher[i, t]) - centre) / temperature).softmax(0).detach()
            log = (head_scores(objective.head, student[i, t]) / 0.1).log_softmax(0)
            total = total - (target * log).sum() / (len(places) * len(batch))
        scores += [head_scores(objective.teacher_head, teacher[i, t]) for t in range(9) if captions[i, t] > 0]
    assert_same(ours, total, learner)
    learner.after_update(CLOCK, 1.0, torch.tensor(True))
    assert torch.allclose(objective.centre.mean, 0.9 * centre + 0.1 * torch.stack(scores).mean(0))


def test_published_text_centre_is_the_mean_of_probabilities():
    learner = learner_of({"mlm": {"weight": 0}, "text_distillation": {"head": HEAD, "centre_on": "probabilities"}})
    batch, objective = batch_of(learner), learner.objectives["text_distillation"]
    losses_of(learner, batch)
    learner.after_update(CLOCK, 1.0, torch.tensor(True))
    assert float(objective.centre.mean.sum()) == pytest.approx(0.1)


def test_a_skipped_step_leaves_the_centre_alone():
    learner = learner_of({"dino": {"head": HEAD}})
    before = learner.objectives["dino"].centre.mean.clone()
    losses_of(learner, batch_of(learner))
    learner.after_update(CLOCK, 1.0, torch.tensor(False))
    learner.after_update(CLOCK, 1.0, torch.tensor(True))
    assert torch.equal(learner.objectives["dino"].centre.mean, before)


def test_micro_batches_make_one_update_of_the_centre():
    whole, parts = Centre(4, 0.9).double(), Centre(4, 0.9).double()
    scores = torch.randn(10, 4, dtype=torch.float64)
    whole.observe(scores)
    for piece in scores.split([3, 7]):
        parts.observe(piece)
    whole.update(), parts.update()
    assert torch.allclose(whole.mean, parts.mean)


def test_prototypes_are_frozen_in_the_first_epoch_only():
    learner = learner_of({"dino": {"head": HEAD}})
    head = learner.objectives["dino"].head
    for step, frozen in ((0, True), (9, True), (10, False)):
        learner.zero_grad()
        losses_of(learner, batch_of(learner))["dino"].backward()
        learner.before_update(replace(CLOCK, step=step))
        assert (head.prototypes.direction.grad is None) is frozen
        assert head.mlp[0].weight.grad is not None


def test_sinkhorn_knopp_balances_prototypes_and_matches_the_plain_algorithm():
    scores = torch.randn(12, 5, dtype=torch.float64)
    ours = sinkhorn_knopp(scores, temperature=0.5, iterations=3)
    q = [[float((scores[i, k] / 0.5).exp()) for k in range(5)] for i in range(12)]
    for _ in range(3):
        columns = [sum(q[i][k] for i in range(12)) for k in range(5)]
        q = [[q[i][k] / columns[k] / 5 for k in range(5)] for i in range(12)]
        q = [[x / sum(row) / 12 for x in row] for row in q]
    assert torch.allclose(ours, torch.tensor(q, dtype=torch.float64) * 12)
    assert torch.allclose(ours.sum(1), torch.ones(12, dtype=torch.float64))
    many = sinkhorn_knopp(scores, temperature=0.5, iterations=200)
    assert torch.allclose(many.mean(0), torch.full((5,), 0.2, dtype=torch.float64), atol=1e-6)


def test_sinkhorn_knopp_of_scores_whose_shares_are_smaller_than_any_float():
    """Against the plain algorithm in decimals of 60 digits, which hold exp(-100000)."""
    scores = torch.randn(6, 4) * 100
    ours = sinkhorn_knopp(scores, 0.04)
    with decimal.localcontext(prec=60):
        q = [[(decimal.Decimal(float(x)) / decimal.Decimal("0.04")).exp() for x in row] for row in scores]
        for _ in range(3):
            columns = [sum(row[k] for row in q) for k in range(4)]
            q = [[row[k] / columns[k] for k in range(4)] for row in q]
            q = [[x / sum(row) for x in row] for row in q]
    assert torch.allclose(ours, torch.tensor([[float(x) for x in row] for row in q]), atol=1e-3)
    assert torch.allclose(ours.sum(1), torch.ones(6))


def test_a_head_that_is_lent_is_frozen_though_its_owner_does_not_run():
    learner = learner_of({"dino": {"head": HEAD, "weight": 0}, "ibot": {"head": "dino"}})
    for step, frozen in [(9, True), (10, False)]:
        losses_of(learner, batch_of(learner))["ibot"].backward()
        learner.before_update(replace(CLOCK, step=step))
        assert (learner.objectives["dino"].head.prototypes.direction.grad is None) is frozen


def test_a_score_that_is_no_number_makes_targets_that_are_none():
    scores = torch.randn(4, 3)
    scores[1, 2] = float("nan")
    assert sinkhorn_knopp(scores, 0.5).isnan().any(1).all()


def test_sinkhorn_knopp_of_no_tokens_and_of_tokens_that_take_no_part():
    assert sinkhorn_knopp(torch.empty(0, 4), 0.04).shape == (0, 4)
    scores, none = torch.randn(5, 4, dtype=torch.float64), torch.full((2, 4), float("-inf"), dtype=torch.float64)
    with_some = sinkhorn_knopp(torch.cat([scores, none]), 0.5)
    assert torch.allclose(with_some[:5], sinkhorn_knopp(scores, 0.5)) and not with_some[5:].any()
    assert not sinkhorn_knopp(none, 0.5).any()


def test_lengths_of_prototypes_are_learned_where_asked():
    """As torch's own weight normalisation; at first they are 1, and they are frozen and followed as directions are."""
    head = PrototypeHead(6, HeadConfig(**HEAD, learn_lengths=True)).double()
    theirs = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 24, bias=False, dtype=torch.float64))
    lengths, directions = theirs.parametrizations.weight.original0, theirs.parametrizations.weight.original1
    with torch.no_grad():
        head.prototypes.length.uniform_(0.5, 2)
        lengths.copy_(head.prototypes.length), directions.copy_(head.prototypes.direction)
    x = torch.randn(5, 8, dtype=torch.float64)
    assert torch.allclose(head.prototypes(x), theirs(x))
    head.prototypes(x).square().sum().backward(), theirs(x).square().sum().backward()
    assert torch.allclose(head.prototypes.length.grad, lengths.grad)
    assert torch.allclose(head.prototypes.direction.grad, directions.grad)

    learner = learner_of({"dino": {"head": HEAD | {"learn_lengths": True}}})
    dino = learner.objectives["dino"]
    assert decays("objectives.dino.head.prototypes.length", dino.head.prototypes.length, "weights_only"), "as DINO's"
    assert torch.equal(dino.head.prototypes.length, torch.ones(24, 1, dtype=torch.float64))
    for step, frozen in [(9, True), (10, False)]:
        losses_of(learner, batch_of(learner))["dino"].backward()
        learner.before_update(replace(CLOCK, step=step))
        assert (dino.head.prototypes.length.grad is None) is frozen
    with torch.no_grad():
        dino.head.prototypes.length.fill_(3.0), dino.teacher_head.prototypes.length.fill_(1.0)
    learner.after_update(CLOCK, 0.75, torch.tensor(True))
    assert torch.allclose(dino.teacher_head.prototypes.length, torch.full((24, 1), 1.5, dtype=torch.float64))


@pytest.mark.parametrize("name", ["dino", "ibot"])
def test_sinkhorn_targets_are_used(name: str):
    settings = {"dino": {"head": HEAD}, "ibot": {"head": HEAD}}
    plain, balanced = (learner_of({name: settings[name] | {"centring": c}}) for c in ("momentum", "sinkhorn_knopp"))
    first, second = (float(losses_of(x, batch_of(x))[name].detach()) for x in (plain, balanced))
    assert abs(first - second) > 1e-6


def test_collapse_signs_tell_the_two_collapses_from_health():
    from harmony.objectives.targets import signs_of_collapse

    one = F.one_hot(torch.zeros(50, dtype=torch.int64), 8).double()
    even = torch.full((50, 8), 1 / 8, dtype=torch.float64)
    healthy = F.one_hot(torch.arange(48) % 8, 8).double()
    zero = torch.zeros((), dtype=torch.float64)
    use = {n: float(signs_of_collapse(t, zero)["prototype_use"]) for n, t in [("1", one), ("e", even), ("h", healthy)]}
    entropy = {
        n: float(signs_of_collapse(t, zero)["target_entropy"]) for n, t in [("1", one), ("e", even), ("h", healthy)]
    }
    assert use["1"] == pytest.approx(1 / 8) and use["h"] == pytest.approx(1) and use["e"] == pytest.approx(1)
    assert entropy["1"] == pytest.approx(0, abs=1e-6) and entropy["h"] == pytest.approx(0, abs=1e-6)
    assert entropy["e"] == pytest.approx(torch.log(torch.tensor(8.0)).item())
