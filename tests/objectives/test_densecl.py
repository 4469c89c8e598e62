"""DenseCL against a plain transcription, and its matching by geometry against crops of a picture of coordinates."""

import pytest
import torch
from parts import CLOCK, assert_same, batch_of, gradients, learner_of, losses_of
from torch import Tensor

from harmony.chance import Chance
from harmony.data.cutting import Cutter
from harmony.data.views import ViewConfig
from harmony.errors import UserError
from harmony.objectives import densecl
from harmony.objectives.densecl import same_places
from harmony.objectives.queues import Queue

SETTINGS = {
    "head": {"hidden": 16, "output": 8, "norm": "none"},
    "dense_head": {"hidden": 16, "output": 6, "norm": "none"},
    "temperature": 0.3,
    "dense": 0.4,
    "queue": 7,
}


def unit(x: Tensor) -> Tensor:
    return x / x.norm()


def placed(batch):
    """A batch whose crops lie somewhere: overlapping by half, mirrored, apart, one within the other, the same."""
    first = [[0, 0, 0.5, 1], [0.2, 0.1, 0.6, 0.5], [0, 0, 0.3, 0.3], [0.1, 0.2, 0.8, 0.7], [0.3, 0.3, 0.4, 0.4]]
    second = [[0.25, 0, 0.5, 1], [0.2, 0.1, 0.6, 0.5], [0.5, 0.5, 0.5, 0.5], [0.3, 0.3, 0.2, 0.2], [0.3, 0.3, 0.4, 0.4]]
    batch.boxes["global"] = torch.tensor([first, second])
    batch.flips["global"] = torch.tensor([[False, True, False, True, False], [False, False, True, True, False]])
    return batch


def place_of(box: Tensor, flip: bool, row: float, column: float) -> tuple[float, float]:
    """Where in the image a place of a crop (in shares of the crop as seen) lies."""
    left, top, width, height = box.tolist()
    return left + (1 - column if flip else column) * width, top + row * height


def partner_by_geometry(batch, i: int, n: int) -> int | None:
    """The patch of crop 1 whose part of the image holds the centre of patch n of crop 0; 4 by 4 patches."""
    boxes, flips = batch.boxes["global"][:, i], batch.flips["global"][:, i]
    x, y = place_of(boxes[0], bool(flips[0]), (n // 4 + 0.5) / 4, (n % 4 + 0.5) / 4)
    for m in range(16):
        corners = [place_of(boxes[1], bool(flips[1]), (m // 4 + d) / 4, (m % 4 + d) / 4) for d in (0, 1)]
        (x0, x1), (y0, y1) = (sorted(values) for values in zip(*corners, strict=True))
        if x0 <= x < x1 and y0 <= y < y1:
            return m
    return None


@pytest.mark.parametrize("matching", ["features", "geometry"])
def test_densecl(matching: str):
    learner = learner_of({"densecl": SETTINGS | {"matching": matching}})
    batch, objective = placed(batch_of(learner)), learner.objectives["densecl"]
    fast = learner.student.image.encode(batch.images["global"][0])
    slow = learner.teacher.image.encode(batch.images["global"][1])
    total: Tensor = torch.zeros((), dtype=torch.float64)
    for i in range(len(batch)):
        q, k = unit(objective.head(fast.cls[i])), unit(objective.teacher_head(slow.cls[i])).detach()
        positive = torch.exp(q @ k / 0.3)
        negatives = sum(torch.exp(q @ old / 0.3) for old in objective.queue.vectors)
        total = total - 0.6 * torch.log(positive / (positive + negatives)) / len(batch)
        terms = []
        for n in range(16):
            if matching == "geometry":
                partner = partner_by_geometry(batch, i, n)
            else:
                likeness = [float((unit(fast.patches[i, n]) @ unit(slow.patches[i, m])).detach()) for m in range(16)]
                partner = max(range(16), key=likeness.__getitem__)
            if partner is None:
                continue
            r = unit(objective.dense_head(fast.patches[i, n]))
            t = unit(objective.teacher_dense_head(slow.patches[i, partner])).detach()
            positive = torch.exp(r @ t / 0.3)
            negatives = sum(torch.exp(r @ old / 0.3) for old in objective.dense_queue.vectors)
            terms.append(-torch.log(positive / (positive + negatives)))
        if terms:
            total = total + 0.4 * torch.stack(terms).mean() / len(batch)
        assert matching == "features" or len(terms) == [8, 16, 0, 1, 16][i]
    assert_same(losses_of(learner, batch)["densecl"], total, learner)
    assert float(learner.signs()["densecl/matched"]) == (1 if matching == "features" else 41 / 80)


def test_similarities_piece_by_piece_are_those_at_once(monkeypatch: pytest.MonkeyPatch):
    """Pieces of 3 of the 80 patches (and of the 5 images): same losses, signs and gradients, and no larger matrix."""
    largest: list[int] = []
    similarities = Queue.similarities

    def seen(queue: Queue, queries: Tensor, keys: Tensor) -> Tensor:
        largest.append(len(queries))
        return similarities(queue, queries, keys)

    monkeypatch.setattr(Queue, "similarities", seen)
    found = []
    for at_once in (densecl.AT_ONCE, 21):
        monkeypatch.setattr(densecl, "AT_ONCE", at_once)
        largest.clear()
        learner = learner_of({"densecl": SETTINGS})
        loss = losses_of(learner, batch_of(learner))["densecl"]
        forward = len(largest)
        found.append((loss.detach(), learner.signs(), gradients(loss, learner), max(largest)))
        again = len(largest) - forward
        assert again == (0 if forward == 2 else forward), "pieces are computed anew for the gradients, one by one"
    (whole, signs, expected, all_rows), (pieces, same_signs, ours, rows) = found
    assert (all_rows, rows) == (80, 3)
    assert torch.allclose(pieces, whole, rtol=1e-12) and same_signs == signs
    for a, b in zip(ours, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)


def test_geometry_finds_the_place_that_real_crops_show():
    """Crops of a picture whose colours are its coordinates: the partner's colour is the patch's own."""
    size, grid, images = 64, 8, 12
    ramp = (torch.arange(96) * 255 / 95).round().to(torch.uint8)
    picture = torch.stack([ramp[None].expand(96, 96), ramp[:, None].expand(96, 96), torch.zeros(96, 96).byte()])
    view = ViewConfig(count=2, size=size, scale=(0.4, 1.0), flip=0.5)
    crops = Cutter(Chance.of_examples(0, 0, torch.arange(images)), {"v": view})
    crops.place(range(images), [(96, 96)] * images)
    for place in range(images):
        crops.cut(place, picture)
    boxes = crops.relative_boxes()["v"]
    partner, has_one = same_places(boxes, crops.flips["v"], (grid, grid))
    tiles = crops.images["v"].float().unflatten(-1, (grid, -1)).unflatten(-3, (grid, -1)).mean((-1, -3))
    colours = tiles[:, :, :2].flatten(3).transpose(2, 3) / 255  # (2, B, N, 2): where in the image each patch lies
    matched = colours[1].gather(1, partner[..., None].expand(-1, -1, 2))
    patch_of_second = boxes[1, :, None, 2:] / grid
    off = ((colours[0] - matched).abs() / patch_of_second)[has_one]
    assert 0.3 < has_one.float().mean() < 1 and crops.flips["v"].any() and not crops.flips["v"].all()
    assert off.max() < 0.5 + 0.15, "a patch's centre lies in its partner: half a patch off at most, and colours round"


def test_queues_take_the_crop_and_the_mean_of_its_patches():
    learner = learner_of({"densecl": SETTINGS})
    batch, objective = batch_of(learner), learner.objectives["densecl"]
    losses_of(learner, batch)
    learner.after_update(CLOCK, 1.0, torch.tensor(True))
    slow = learner.teacher.image.encode(batch.images["global"][1])
    for i in range(5):
        mean = sum(objective.teacher_dense_head(slow.patches[i, n]) for n in range(16)) / 16
        assert torch.allclose(objective.queue.vectors[i], unit(objective.teacher_head(slow.cls[i])))
        assert torch.allclose(objective.dense_queue.vectors[i], unit(mean))


def test_crops_without_a_common_place_give_a_loss_with_gradients():
    learner = learner_of({"densecl": SETTINGS | {"matching": "geometry", "dense": 1.0}})
    batch = placed(batch_of(learner))
    batch.boxes["global"] = torch.tensor([[[0, 0, 0.2, 0.2]] * 5, [[0.5, 0.5, 0.5, 0.5]] * 5])
    loss = losses_of(learner, batch)["densecl"]
    loss.backward()
    assert float(loss) == 0
    assert all(p.grad is not None for p in learner.objectives["densecl"].dense_head.parameters())


def test_no_gradient_reaches_the_teacher():
    learner = learner_of({"densecl": SETTINGS})
    losses_of(learner, batch_of(learner))["densecl"].backward()
    assert all(p.grad is None for p in learner.teacher.parameters())


def test_one_crop_is_refused():
    with pytest.raises(UserError, match=r"views.plain.count=2"):
        learner_of({"densecl": SETTINGS | {"view": "plain"}})
