"""A recipe's learner and a batch that have shapes but no contents, to see what a step would take."""

from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from harmony.chance import Chance
from harmony.data.batch import Batch
from harmony.data.masks import PatchSampler
from harmony.errors import UserError
from harmony.models.text import VOCABULARY
from harmony.recipe import Recipe
from harmony.schedules import Clock
from harmony.training.learner import Learner, build_learner
from harmony.training.resuming import without_init

CLOCK = Clock(step=0, steps=1000, epoch_steps=100)
"""The place in a run that is rehearsed: its beginning."""


@dataclass(frozen=True)
class Rehearsal:
    """A step that can be run without memory or time.

    Attributes:
        learner: the recipe's own.
        batch: what one process encodes at a time. Captions have one length, masks are drawn as the recipe says.
        mode: to be entered around everything that is run.
    """

    learner: Learner
    batch: Batch
    mode: FakeTensorMode


def rehearse(recipe: Recipe, caption_tokens: int, processes: int = 1) -> Rehearsal:
    """Build the learner and a batch of a recipe, whose data need not be given.

    Args:
        recipe: the recipe.
        caption_tokens: tokens of every caption, begin and end included, as far as the context allows.
        processes: over how many the batch is spread.

    Raises:
        UserError: something in the recipe does not fit together.
    """
    parts = processes * recipe.train.accumulate
    if recipe.data.batch_size % parts:
        raise UserError(
            f"data.batch_size {recipe.data.batch_size} cannot be spread over {processes} processes with "
            f"train.accumulate {recipe.train.accumulate}; make it a multiple of {parts}"
        )
    learner = _empty_learner(recipe)
    drawn = without_pixels(recipe, learner, recipe.data.batch_size // parts, caption_tokens)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        learner.to_empty(device="cpu")
        sizes = {name: (view.count, len(drawn), 3, view.size, view.size) for name, view in recipe.views.items()}
        images = {name: torch.empty(size) for name, size in sizes.items()}
        return Rehearsal(learner, replace(drawn.map(mode.from_tensor), images=images), mode)


def _empty_learner(recipe: Recipe) -> Learner:
    """The recipe's learner without memory for its weights."""
    efficiency = recipe.efficiency.model_copy(update={"compile": False})
    with torch.device("meta"):
        return build_learner(without_init(recipe).model_copy(update={"efficiency": efficiency}))


def without_pixels(recipe: Recipe, learner: Learner, examples: int, caption_tokens: int, epoch: int = 0) -> Batch:
    """A batch with everything but pixels: captions of one length, and masks as the recipe draws them in an epoch."""
    chance = Chance.of_examples(recipe.train.seed, epoch, torch.arange(examples))
    batch = Batch([str(number) for number in range(examples)], chance)
    if recipe.model.text is not None:
        words = max(1, min(caption_tokens, recipe.model.text.context) - 2)
        begin, end = torch.full((examples, 1), VOCABULARY - 2), torch.full((examples, 1), VOCABULARY - 1)
        batch.captions = {"caption": torch.cat([begin, torch.full((examples, words), 1), end], dim=1)}
    if learner.needs_labels():
        batch.labels = torch.arange(examples)
    for name, view in recipe.views.items():
        batch.boxes[name] = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(view.count, examples, 4)
        batch.flips[name] = torch.zeros(view.count, examples, dtype=torch.bool)
    for name, sampler in learner.masks().items():
        if isinstance(sampler, PatchSampler):
            view = recipe.views[sampler.view]
            grid = learner.student.image.grid(view.size)
            batch.masks[name] = sampler.draw(name, chance, view.count, grid, CLOCK)
        else:
            batch.masks[name] = sampler.draw(name, chance, batch.captions[sampler.stream], CLOCK)
    return batch
