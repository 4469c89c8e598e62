"""What compares images with each other learns nothing from one, and says so; everything else learns."""

import pytest
import torch
from parts import HEAD, batch_of, learner_of, losses_of

from harmony.errors import UserError

SMALL = {"hidden": 16, "output": 8}
KINDS = {
    "clip": {},
    "siglip": {},
    "filip": {},
    "simclr": {"head": SMALL},
    "vicreg": {"head": SMALL},
    "koleo": {},
    "mocov3": {"head": SMALL | {"layers": 3, "norm": "all"}, "predictor": {"hidden": 16, "layers": 2, "norm": "all"}},
    "dino": {"head": HEAD},
    "swav": {"head": SMALL, "prototypes": 6},
    "mae": {"decoder": {"width": 16, "depth": 1, "heads": 2}},
}


@pytest.mark.parametrize("name", KINDS)
def test_one_image_gives_a_gradient_where_images_are_not_compared(name: str):
    learner = learner_of({name: KINDS[name]})
    losses = losses_of(learner, batch_of(learner, examples=1))
    torch.stack(list(losses.values())).sum().backward()
    largest = max(float(p.grad.abs().max()) for p in learner.student.parameters() if p.grad is not None)
    assert (largest < 1e-9) == learner.objectives[name].compares_images


@pytest.mark.parametrize(("name", "images", "processes", "words"), [
    ("clip", 2, 2, None),
    ("clip", 1, 1, "a part of a step has only one"),
    ("koleo", 4, 2, None),
    ("koleo", 2, 2, "a part of a step has only one for each process"),
])  # fmt: skip
def test_where_the_other_images_must_be(name: str, images: int, processes: int, words: str | None, monkeypatch):
    """CLIP compares those of all ranks; KoLeo those of each rank."""
    learner = learner_of({name: KINDS[name]})
    monkeypatch.setattr("harmony.ranks.count", lambda: processes)
    if words is None:
        learner.check_part(images)
    else:
        with pytest.raises(UserError, match=words):
            learner.check_part(images)
