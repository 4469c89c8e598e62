"""A small recipe and a batch for it, for tests that make a step."""

import torch

from harmony import recipe as recipes
from harmony.chance import Chance
from harmony.data.batch import Batch
from harmony.data.masks import PatchSampler
from harmony.recipe import Recipe
from harmony.schedules import Clock
from harmony.training.learner import Learner

TINY = (
    "model.image.depth=1",
    "model.image.width=32",
    "model.image.heads=2",
    "model.text={width: 32, layers: 1, heads: 2, context: 16}",
    "objectives.mae.decoder.depth=1",
    "views.global.size=32",
    "views.local={count: 2, size: 16}",
    "data.batch_size=4",
)


def tiny(*overrides: str) -> Recipe:
    return recipes.resolve("quickstart", [*TINY, *overrides])


def real_batch(recipe: Recipe, learner: Learner, caption_tokens: int) -> Batch:
    """A batch as the loader would make it, of random pixels."""
    examples = recipe.data.batch_size
    chance = Chance.of_examples(recipe.train.seed, 0, torch.arange(examples))
    captions = torch.full((examples, caption_tokens), 300)
    captions[:, 0], captions[:, -1] = 49406, 49407
    batch = Batch([str(i) for i in range(examples)], chance, captions={"caption": captions})
    for name, view in recipe.views.items():
        batch.images[name] = torch.randn(view.count, examples, 3, view.size, view.size)
    clock = Clock(0, 1000, 100)
    for name, sampler in learner.masks().items():
        if isinstance(sampler, PatchSampler):
            view = recipe.views[sampler.view]
            grid = learner.student.image.grid(view.size)
            batch.masks[name] = sampler.draw(name, chance, view.count, grid, clock)
        else:
            batch.masks[name] = sampler.draw(name, chance, captions, clock)
    return batch
