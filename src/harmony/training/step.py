"""What one step does.

batch -> colours on the device -> for each group of objectives: encode, losses, backward, while final gradients are
already on their way between ranks -> clip -> optimiser -> centres and teacher.

Host and device meet once a step, when the losses and the norms of the gradient, a few numbers, are read to see whether
they are finite. When they are not, the update, the centres and the teacher are left out on all ranks.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harmony import ranks
from harmony.data.batch import Batch
from harmony.data.photometric import augment
from harmony.recipe import Recipe
from harmony.schedules import Clock
from harmony.training.diagnostics import complaint
from harmony.training.learner import Learner
from harmony.training.optimiser import Gradients, adamw, learning_rate, set_rates
from harmony.training.reduction import Reduction

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_LEAST_SCALE = 2.0**-8
"""A gradient that overflows fp16 even at this loss scale is no longer the scaler's business."""


@dataclass(frozen=True)
class Measured:
    """What one step found, as plain numbers, means over ranks and micro-batches.

    Attributes:
        losses, weights: unweighted losses by name, and the factor of each in the sum.
        norms: norm of the gradient by part, before clipping.
        rates: learning rate, weight decay, teacher momentum; in fp16 the loss scale.
        complaint: what was not finite, so that the update was left out; None when all was well, or when fp16's scaler
            left the update out to try a smaller scale.
        sick: whether this rank's examples may be to blame for it.
    """

    losses: dict[str, float]
    weights: dict[str, float]
    norms: dict[str, float]
    rates: dict[str, float]
    complaint: str | None = None
    sick: bool = False

    @property
    def loss(self) -> float:
        """The weighted sum."""
        return sum(self.weights[name] * value for name, value in self.losses.items())

    @property
    def norm(self) -> float:
        """The norm of the whole gradient."""
        return sum(norm**2 for norm in self.norms.values()) ** 0.5


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

    def step(self, loaded: Sequence[Batch], clock: Clock, logged: bool = False) -> Measured:
        """Gradients of all losses over all micro-batches, then the update.

        Args:
            loaded: the micro-batches of this rank, as the loader gives them.
            clock: the place in the run before the step.
            logged: whether the learner's signs will be read.
        """
        rates = self._set_rates(clock)
        self.reduction.begin()
        losses, weights = self.backward(loaded, clock, logged)
        self.reduction.finish()
        self.scaler.unscale_(self.optimiser)
        self.learner.before_update(clock)
        norms = self.gradients.norms()
        own, joined, by_part = self._read(losses, norms)
        problem = complaint(joined, by_part)
        if problem is None:
            self.gradients.clip(norms)
            self.scaler.step(self.optimiser)
            self.learner.after_update(clock, rates["teacher_momentum"])
        else:
            self.learner.after_skip()
        self.scaler.update()
        self.optimiser.zero_grad()
        if complaint(joined, {}) is None:
            # Only the gradient is to blame. That is how fp16's scaler finds its scale; else any rank may be the cause.
            sought = self.scaler.is_enabled() and rates["loss_scale"] > _LEAST_SCALE
            return Measured(joined, weights, by_part, rates, None if sought else problem, sick=True)
        return Measured(joined, weights, by_part, rates, problem, sick=complaint(own, {}) is not None)

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
        return rates | ({"loss_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {})

    def _prepared(self, batch: Batch) -> Batch:
        batch = batch.to(self._device)
        image = self._recipe.model.image
        return augment(batch, self._recipe.views, image.mean, image.std) if self.augments else batch

    def _read(
        self, losses: dict[str, Tensor], norms: Tensor
    ) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
        """This rank's losses, their means over ranks, and the gradient's norm by part: one transfer to the host."""
        own, parts = torch.stack(list(losses.values())), self.gradients.by_part(norms)
        numbers = torch.cat([own, ranks.mean(own), parts]).tolist()
        count = len(losses)
        return (
            dict(zip(losses, numbers[:count], strict=True)),
            dict(zip(losses, numbers[count : 2 * count], strict=True)),
            dict(zip(self.gradients.parts, numbers[2 * count :], strict=True)),
        )


def _seed_generators(seed: int, step: int) -> None:
    """Seed Python's and torch's generators for one step on one rank.

    Nothing in harmony draws from them while it trains. An objective from elsewhere that does draws the same numbers
    after a resume, and other numbers on another rank.
    """
    number = (seed * 1_000_003 + step) * ranks.count() + ranks.rank()
    random.seed(number)
    torch.manual_seed(number % 2**63)
