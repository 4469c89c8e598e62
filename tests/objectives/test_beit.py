"""BEiT v2's codes against plain transcriptions: losses and gradients, nearest codes, moving averages, dead codes."""

from itertools import pairwise

import pytest
import torch
from parts import CLOCK, assert_same, batch_of, learner_of, losses_of
from torch import Tensor

from harmony.data.batch import Mask
from harmony.models.vision import Segment
from harmony.objectives.codebook import Codebook

IMAGE = {"name": "vit_tiny_patch16_224", "patch": 8, "width": 12, "depth": 1, "heads": 2, "mean": (0.4, 0.4, 0.4)}
FROZEN = {"tokenizer": {"image": IMAGE, "init": None}}
BEIT = {"codes": 6, "decay": 0.8, "dead": 0.3}


def beit(**settings):
    learner = learner_of({"beit": BEIT | settings}, frozen=FROZEN)
    return learner, learner.objectives["beit"]


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def hidden_features(learner, batch) -> list[tuple[int, int, int, Tensor]]:
    """(crop, image, patch, frozen feature) of each hidden patch, from pixels in the frozen model's own colours."""
    mean, std = (
        torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    own_mean = torch.tensor(IMAGE["mean"], dtype=torch.float64).view(3, 1, 1)
    trunk, found = learner.frozen["tokenizer"].image.trunk, []
    for v, crop in enumerate(batch.images["global"]):
        tokens = trunk.forward_features(((crop * std + mean) - own_mean) / std)
        for i in range(len(batch)):
            hidden = batch.masks["block"].masked[v, i]
            found += [(v, i, n, unit(tokens[i, 1 + n])) for n in range(16) if hidden[n]]
    return found


def nearest(codes: Tensor, feature: Tensor) -> int:
    return max(range(len(codes)), key=lambda k: float(codes[k] @ feature))


def test_loss_and_gradients():
    learner, objective = beit()
    batch = batch_of(learner)
    masked = batch.masks["block"].masked
    masked[0, 0] = False  # an image with nothing masked adds zero
    masked[1, 0, :3] = True
    batch.masks["block"] = Mask.of(masked)
    codes = objective.codebook.codes.clone()
    ours = losses_of(learner, batch)["beit"]
    total: Tensor = torch.zeros((), dtype=torch.float64)
    used = set()
    for v, i, n, feature in hidden_features(learner, batch):
        student = learner.student.image.encode_packed([Segment(batch.images["global"][v], replace=masked[v])])[0]
        scores = objective.head.weight @ student.patches[i, n] + objective.head.bias
        code = nearest(codes, feature.detach())
        used.add(code)
        total = total - scores.log_softmax(0)[code] / (int(masked[v, i].sum()) * 2 * len(batch))
    assert len(used) > 1
    assert_same(ours, total, learner)
    assert all(p.grad is None and not p.requires_grad for p in learner.frozen.parameters())


def test_every_image_hides_two_fifths_of_its_patches():
    learner, _ = beit()
    assert (batch_of(learner).masks["block"].masked.sum(-1) == 6).all()  # of 16


def test_codes_begin_as_features_and_follow_their_moving_averages():
    learner, objective = beit()
    book, decay = objective.codebook, BEIT["decay"]
    first, second = batch_of(learner, seed=1), batch_of(learner, seed=2)
    losses_of(learner, first)
    learner.after_update(CLOCK, 1.0, torch.tensor(True))
    every = hidden_features(learner, first)
    lots = first.chance.uniform("beit/lots", 2, 16)
    order = sorted(every, key=lambda hidden: float(lots[hidden[1], hidden[0], hidden[2]]))
    codes = torch.stack([feature for *_, feature in order[:6]])
    assert torch.allclose(book.codes, codes), "at first, every code is put onto a hidden patch drawn by chance"
    assert torch.allclose(book.use, torch.full((6,), 1 / 6, dtype=torch.float64))
    losses_of(learner, second)
    learner.after_update(CLOCK, 1.0, torch.tensor(True))
    assigned: list[list[Tensor]] = [[] for _ in range(6)]
    every = hidden_features(learner, second)
    for *_, feature in every:
        assigned[nearest(codes, feature)].append(feature)
    for k, own in enumerate(assigned):
        expected = unit(decay * codes[k] + (1 - decay) * unit(sum(own))) if own else codes[k]
        assert torch.allclose(book.codes[k], expected)
        assert float(book.use[k]) == pytest.approx(decay / 6 + (1 - decay) * len(own) / len(every))
    assert any(assigned) and any(len(a) != len(b) for a, b in pairwise(assigned))


def book_of(codes: Tensor, use: Tensor, decay: float = 0.8) -> Codebook:
    book = Codebook(*codes.shape, decay=decay, dead=0.3).to(codes.dtype)
    book.codes.copy_(codes), book.use.copy_(use)
    return book


def seen(book: Codebook, count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.normalize(torch.randn(count, book.codes.shape[1], generator=generator), dim=1)
    lots = torch.rand(count, generator=generator)
    book.observe(features, book.nearest(features), lots)
    return features, lots


def test_dead_codes_move_and_others_stay():
    codes = torch.eye(5)[:4]
    book = book_of(codes, torch.tensor([0.5, 0.01, 0.44, 0.05]), decay=0.999)
    features, lots = seen(book, 7, seed=0)
    book.update()
    first, second = features[lots.argsort()[:2]]
    assert torch.allclose(book.codes[1], first) and torch.allclose(book.codes[3], second)
    assert book.use[1] == book.use[3] == 0.25
    for alive in (0, 2):
        assert float(book.codes[alive] @ codes[alive]) > 0.99


def test_with_fewer_features_than_dead_codes_the_rest_wait_for_the_next_step():
    book = book_of(torch.eye(5)[:4], torch.zeros(4), decay=0.99)
    features, lots = seen(book, 2, seed=0)
    book.update()
    assert torch.allclose(book.codes[:2], features[lots.argsort()])
    assert (book.use >= 0.3 / 4).tolist() == [True, True, False, False]
    later, lots = seen(book, 5, seed=1)
    book.update()
    assert torch.allclose(book.codes[2:], later[lots.argsort()[:2]])
    assert (book.use >= 0.3 / 4).all()


def test_micro_batches_make_one_update():
    start = torch.eye(6)[:5], torch.tensor([0.0, 0.3, 0.0, 0.4, 0.3])
    whole, parts = book_of(*start), book_of(*start)
    features, lots = seen(whole, 9, seed=3)
    for piece in ([0, 1, 2], [3], [4, 5, 6, 7, 8]):
        parts.observe(features[piece], parts.nearest(features[piece]), lots[piece])
    whole.update(), parts.update()
    assert torch.allclose(whole.codes, parts.codes) and torch.allclose(whole.use, parts.use)
    assert not torch.allclose(whole.codes, start[0])


def test_a_skipped_step_leaves_the_codebook_alone_and_its_features_do_not_enter_the_next():
    learner, objective = beit()
    losses_of(learner, batch_of(learner))
    before = {name: tensor.clone() for name, tensor in objective.codebook.state_dict().items()}
    for made in (False, True):  # nothing was observed since, so the second changes nothing either
        learner.after_update(CLOCK, 0.5, torch.tensor(made))
        after = objective.codebook.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    losses_of(learner, batch_of(learner))
    learner.after_update(CLOCK, 0.5, torch.tensor(True))
    assert not torch.equal(objective.codebook.codes, before["codes"])


def test_nothing_hidden_changes_nothing():
    learner, objective = beit()
    batch = batch_of(learner)
    batch.masks["block"] = Mask.of(torch.zeros_like(batch.masks["block"].masked))
    before = objective.codebook.codes.clone()
    loss = losses_of(learner, batch)["beit"]
    loss.backward()
    assert float(loss.detach()) == 0 and objective.head.weight.grad is not None
    learner.after_update(CLOCK, 1.0, torch.tensor(True))
    assert torch.equal(objective.codebook.codes, before)


def test_k_means_finds_the_directions_that_are_there():
    generator = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(8, 16, generator=generator), dim=1)
    book = Codebook(12, 16, decay=0.7, dead=0.05)
    for _ in range(60):
        noise = 0.1 * torch.randn(96, 16, generator=generator)
        features = torch.nn.functional.normalize(truth.repeat(12, 1) + noise, dim=1)
        book.observe(features, book.nearest(features), torch.rand(96, generator=generator))
        book.update()
    assert ((book.codes @ truth.T).max(0).values > 0.95).all(), "every direction has a code"


def test_loss_is_lower_for_better_predictions():
    learner, objective = beit()
    batch = batch_of(learner)
    even = float(losses_of(learner, batch)["beit"].detach())
    optimiser = torch.optim.Adam(objective.head.parameters(), lr=0.1)
    for _ in range(20):
        optimiser.zero_grad()
        loss = losses_of(learner, batch)["beit"]
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.8 * even
    assert 0 < float(learner.signs()["beit/accuracy"]) <= 1 and float(learner.signs()["beit/code_use"]) <= 1
