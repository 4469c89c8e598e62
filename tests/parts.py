"""A small learner with chosen objectives, and random batches for it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from harmony.chance import Chance
from harmony.data.batch import Batch, Mask
from harmony.data.views import ViewConfig
from harmony.interchange.frozen import frozen_models
from harmony.models.settings import FrozenConfig, ModelConfig
from harmony.models.towers import Towers
from harmony.objectives.registry import kinds
from harmony.schedules import Clock
from harmony.training.learner import Learner

CLOCK = Clock(step=30, steps=100, epoch_steps=10)
HEAD = {"prototypes": 24, "hidden": 16, "bottleneck": 8}
ALL: dict[str, dict[str, Any]] = {
    "clip": {"hard_weight": 0.4},
    "dino": {"mask": "block", "head": HEAD},
    "ibot": {"head": "dino"},
    "mae": {"decoder": {"width": 16, "depth": 1, "heads": 2}},
    "mlm": {},
    "text_distillation": {"head": HEAD},
}
VIEWS = {
    "global": ViewConfig(count=2, size=32, scale=(0.3, 1.0)),
    "local": ViewConfig(count=3, size=16, scale=(0.1, 0.3)),
    "plain": ViewConfig(count=1, size=32),
}


def learner_of(
    objectives: dict[str, dict[str, Any]],
    joint: bool = False,
    drop_path: float = 0.0,
    frozen: dict[str, dict[str, Any]] | None = None,
) -> Learner:
    """A learner in float64 whose teacher differs from its student; `frozen` is what a recipe says of frozen models."""
    torch.manual_seed(0)
    image = {"name": "vit_tiny_patch16_224", "patch": 8, "width": 16, "depth": 2, "heads": 2, "drop_path": drop_path}
    model = {"image": image, "text": {"width": 16, "layers": 1, "heads": 2}, "embed": 12}
    towers, classes = Towers(ModelConfig.model_validate(model), 32), kinds()
    built = {
        name: classes[own.get("type", name)](classes[own.get("type", name)].Config(**own), towers, VIEWS)
        for name, own in objectives.items()
    }
    settings = {name: FrozenConfig.model_validate(one) for name, one in (frozen or {}).items()}
    given = frozen_models(settings, ModelConfig.model_validate(model).image, 32)
    for objective in built.values():
        objective.meet({name: one.image for name, one in given.items()})
        objective.borrow(built)
    learner = Learner(towers, built, VIEWS, joint, given).double().train()
    with torch.no_grad():
        for _, slow in learner._pairs():
            for parameter in slow.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return learner


def batch_of(learner: Learner, examples: int = 5, seed: int = 0) -> Batch:
    """Random images and captions with the masks that the learner wants."""
    generator = torch.Generator().manual_seed(seed)
    chance = Chance.of_examples(seed, 0, torch.arange(examples))
    images = {
        name: torch.randn(view.count, examples, 3, view.size, view.size, dtype=torch.float64, generator=generator)
        for name, view in VIEWS.items()
    }
    captions = torch.zeros(examples, 9, dtype=torch.int64)
    for i in range(examples):
        words = 3 + i % 5
        captions[i, 0], captions[i, words + 1] = 49406, 49407
        captions[i, 1 : words + 1] = torch.randint(1, 1000, (words,), generator=generator)
    masks: dict[str, Mask] = {}
    for name, sampler in learner.masks().items():
        if sampler.view is not None:
            view = VIEWS[sampler.view]
            masks[name] = sampler.draw(name, chance, view.count, learner.student.image.grid(view.size), CLOCK)
        else:
            masks[name] = sampler.draw(name, chance, captions, CLOCK)
    return Batch([str(i) for i in range(examples)], chance, images, captions={"caption": captions}, masks=masks)


def losses_of(learner: Learner, batch: Batch) -> dict[str, Tensor]:
    return {k: v for group in learner.losses_by_group(batch, CLOCK, logged=True) for k, v in group.losses.items()}


def gradients(loss: Tensor, learner) -> list[Tensor]:
    weights = [p for p in learner.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, weights, strict=True)]


def assert_same(ours: Tensor, theirs: Tensor, learner) -> None:
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-12)
    for a, b in zip(gradients(ours, learner), gradients(theirs, learner), strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm() + 1e-12
