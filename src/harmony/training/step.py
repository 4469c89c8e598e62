"""What one step does.

batch -> colours on the device -> for each group of objectives: encode, losses, backward, while final gradients are
already on their way between ranks -> clip -> optimiser -> centres and teacher.

Where losses or the norms of the gradient are not finite, the update, the centres and the teacher are left out on all
ranks. The device sees to that by itself; the host reads the numbers when it likes, so that neither waits for the other.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from harmony import ranks
from harmony.data.batch import Batch
from harmony.data.photometric import augment
from harmony.recipe import Recipe
from harmony.schedules import Clock
from harmony.training.learner import Learner
from harmony.training.measured import Numbers
from harmony.training.optimiser import Gradients, adamw, learning_rate, set_rates, update
from harmony.training.reduction import Reduction

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Stepper:
    """What turns batches into updates of a learner.

    Attributes:
        learner: models and objectives, on their device.
        optimiser: AdamW.
        gradients: norms and clipping.
        reduction: their means over ranks.
        scaler: the loss scale of fp16; without effect in other precisions.
        augments: whether crops are changed and normalised on the device.
    """

    def __init__(self, learner: Learner, recipe: Recipe, device: torch.device) -> None:
        self.learner = learner
        self.optimiser = adamw(learner, recipe.optim)
        self.gradients = Gradients(learner.parts(), recipe.optim)
        self.reduction = Reduction(self.gradients.parameters)
        self.dtype = _DTYPES[recipe.train.precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        where = recipe.efficiency.augment
        self.augments = where == "device" or (where == "auto" and device.type != "cpu")
        self._recipe = recipe
        self._device = device
        self._one = torch.ones((), device=device)

    def step(self, loaded: Sequence[Batch], clock: Clock, logged: bool = False) -> Numbers:
        """Gradients of all losses over all micro-batches, then the update. Nothing here waits for the device.

        Args:
            loaded: the micro-batches of this rank, as the loader gives them.
            clock: the place in the run before the step.
            logged: whether the learner's signs will be read.

        Returns:
            What was found, to be read later.
        """
        rates = self._set_rates(clock)
        self.reduction.begin()
        losses, weights = self.backward(loaded, clock, logged)
        self.reduction.finish()
        scale = self.scaler.scale(self._one) if self.scaler.is_enabled() else None
        self.scaler.unscale_(self.optimiser)
        self.learner.before_update(clock)
        norms = self.gradients.norms()
        parts, joined = self.gradients.by_part(norms), ranks.mean(torch.stack(list(losses.values())))
        finite = joined.isfinite().all() & parts.isfinite().all()
        self.gradients.clip(norms)
        update(self.optimiser, finite)
        self.learner.after_update(clock, rates["teacher_momentum"], finite)
        self.scaler.update()
        self.optimiser.zero_grad()
        by_part = dict(zip(self.gradients.parts, parts.unbind(), strict=True))
        return Numbers(losses, joined, by_part, scale, weights, rates)

    def backward(
        self, loaded: Sequence[Batch], clock: Clock, logged: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Add up the gradients of this rank's mean loss over its micro-batches.

        Each group of objectives runs backward before the next is encoded. Signs are those of the last micro-batch.

        Returns:
            Each loss, unweighted and averaged over the micro-batches; and each weight.
        """
        losses: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        for number, batch in enumerate(loaded, start=1):
            last = number == len(loaded)
            groups = self.learner.losses_by_group(self._prepared(batch), clock, logged and last)
            while True:
                with torch.autocast(self._device.type, self.dtype, enabled=self.dtype != torch.float32):
                    group = next(groups, None)
                if group is None:
                    break
                self.scaler.scale(group.total() / len(loaded)).backward()
                weights |= group.weights
                for name, loss in group.losses.items():
                    share = loss.detach() / len(loaded)
                    losses[name] = losses[name] + share if name in losses else share
        return losses, weights

    def _set_rates(self, clock: Clock) -> dict[str, float]:
        """Give the optimiser its rates at this place in the run, and plug-ins their seed."""
        recipe = self._recipe
        _seed_generators(recipe.train.seed, clock.step)
        rates = {
            "lr": learning_rate(recipe.optim, clock, recipe.data.batch_size),
            "weight_decay": recipe.optim.weight_decay(clock),
            "teacher_momentum": recipe.teacher.momentum(clock),
        }
        set_rates(self.optimiser, rates["lr"], rates["weight_decay"])
        return rates

    def _prepared(self, batch: Batch) -> Batch:
        batch = batch.to(self._device)
        image = self._recipe.model.image
        return augment(batch, self._recipe.views, image.mean, image.std) if self.augments else batch


def _seed_generators(seed: int, step: int) -> None:
    """Seed Python's and torch's generators for one step on one rank.

    Nothing in harmony draws from them while it trains. An objective from elsewhere that does draws the same numbers
    after a resume, and other numbers on another rank.
    """
    number = (seed * 1_000_003 + step) * ranks.count() + ranks.rank()
    random.seed(number)
    torch.manual_seed(number % 2**63)
