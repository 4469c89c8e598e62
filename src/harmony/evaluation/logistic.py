"""Multinomial logistic regression by L-BFGS, over all ranks.

The objective is convex: mean cross-entropy + regularisation / 2 * |weight|^2, the bias free, so that its solution does
not depend on where one starts. It is scikit-learn's for C = 1 / (regularisation * N).

Shapes: N images, D width of their inputs, C classes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from harmony import ranks

ROWS = 16384
"""Rows that are multiplied at a time; what they need in between stays small however many images there are."""


@dataclass(frozen=True)
class Classifier:
    """A linear classifier of standardised inputs.

    Attributes:
        weight: (C, D); of classes that were never seen, zero.
        bias: (C,); of classes that were never seen, -inf.
        mean, scale: (D,), what is taken off inputs, and what they are then divided by.
        gradient: largest absolute entry of the scaled gradient where the fit ended.
        steps: iterations of L-BFGS.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor
    gradient: float = 0.0
    steps: int = 0

    def scores(self, inputs: Tensor) -> Tensor:
        """(N, D) as they are, not standardised -> (N, C)."""
        weight, bias = self.raw()
        return torch.cat([F.linear(rows.to(weight), weight, bias) for rows in inputs.split(ROWS)])

    def raw(self) -> tuple[Tensor, Tensor]:
        """Weight (C, D) and bias (C,) for inputs that are not standardised."""
        weight = self.weight / self.scale
        return weight, self.bias - weight @ self.mean


def statistics(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) of (N, D) inputs; the latter 1 for what is the same in all images.

    Sums are of float64: what is nearly constant beside a large mean would otherwise drown in rounding.
    """
    mean = sum_of(rows.sum(dim=0, dtype=torch.float64) for rows in inputs.split(ROWS)) / len(inputs)
    squares = sum_of((rows.double() - mean).square().sum(dim=0) for rows in inputs.split(ROWS))
    deviation = (squares / len(inputs)).sqrt()
    constant = deviation <= 1e-6 * mean.abs().clamp(min=1e-6)
    return mean.to(inputs), deviation.where(~constant, 1.0).to(inputs)


class Problem:
    """The data of a regression, divided among ranks, in the coordinates in which it is well conditioned.

    Features of an encoder are nearly linearly dependent, and L-BFGS would need thousands of iterations for a weak
    regularisation. So standardised inputs are rotated to their principal axes, which changes neither the objective nor
    its solution, and L-BFGS works on weights that are scaled, axis by axis, by the root of the curvature there. Where
    there are fewer images than axes, the axes without any variance are left out: their weights are zero.

    Args:
        inputs: (N, D), the same on every rank; products are of its dtype, sums and weights of float64.
        labels: (N,) of C classes, two or more of them seen.
        classes: C.
    """

    def __init__(self, inputs: Tensor, labels: Tensor, classes: int) -> None:
        self.classes = classes
        self.examples = len(inputs)
        self.mean, self.scale = statistics(inputs)
        # Of classes that were never seen nothing is learned: their bias would fall for ever.
        self.seen, targets = labels.to(inputs.device).unique(return_inverse=True)
        mine = slice(ranks.rank(), None, ranks.count())
        standardised = (inputs[mine] - self.mean).div_(self.scale)
        covariance = sum_of(rows.T @ rows for rows in standardised.split(ROWS)) / self.examples
        variances, axes = torch.linalg.eigh(ranks.total(covariance))
        kept = min(self.examples, len(variances))
        self._variances, self._axes = variances[-kept:].clamp(min=0), axes[:, -kept:]
        ranks.broadcast([self._variances, self._axes])  # the same axes on all ranks, to the last bit
        for rows in standardised.split(ROWS):  # in place: the inputs of ImageNet take ten gigabytes and more
            rows[:, :kept] = rows @ self._axes.to(rows)
        self._inputs = standardised[:, :kept].contiguous()
        self._targets = targets[mine]
        self._weights = self._axes.new_zeros(len(self.seen), kept + 1)
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def solve(self, regularisation: float, tolerance: float = 1e-4, most: int = 500) -> Classifier:
        """The classifier for a regularisation; begins where the one before ended.

        Args:
            regularisation: factor of half the squared weights, beside the mean over images of the cross-entropy.
            tolerance: largest absolute entry of the scaled gradient that counts as none. Half the square of that
                gradient is about what the objective still lies above its minimum.
            most: iterations at which the fit ends in any case.
        """
        # At equal probabilities the curvature is that of a softmax, 1 / classes, times the variance of the inputs.
        curvature = self._variances / len(self.seen) + regularisation
        scale = torch.cat([curvature, curvature.new_ones(1) / len(self.seen)]).rsqrt()
        scaled = (self._weights / scale).requires_grad_()
        optimiser = torch.optim.LBFGS(
            [scaled],
            max_iter=most,
            max_eval=2 * most,
            tolerance_grad=tolerance,
            tolerance_change=0.0,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            loss, gradient = self.objective(scaled.detach() * scale, regularisation)
            scaled.grad = gradient * scale
            return loss

        optimiser.step(closure)
        self._weights = scaled.detach() * scale
        closure()
        return self._classifier(float(cast(Tensor, scaled.grad).abs().max()), int(optimiser.state[scaled]["n_iter"]))

    def objective(self, weights: Tensor, regularisation: float) -> tuple[Tensor, Tensor]:
        """The objective and its gradient at weights (seen classes, axes + 1), the bias in the last column."""
        loss, gradient = self._cross_entropy(weights.to(self._inputs))
        loss = loss + regularisation / 2 * weights[:, :-1].square().sum()
        penalty = regularisation * weights
        penalty[:, -1] = 0
        return loss, gradient + penalty

    def _cross_entropy(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Its mean and gradient in float64, at weights as they are multiplied.

        The last ones are kept: a fit asks again for where it ended, and the next regularisation begins there.
        """
        if self._last is not None and self._last[0].equal(weights):
            return self._last[1:]
        loss, gradient = self._weights.new_zeros(()), torch.zeros_like(self._weights)
        slopes, bias = weights[:, :-1].contiguous(), weights[:, -1].contiguous()
        for inputs, targets in zip(self._inputs.split(ROWS), self._targets[:, None].split(ROWS), strict=True):
            logs = F.log_softmax(F.linear(inputs, slopes, bias), dim=1)
            loss -= logs.gather(1, targets).sum(dtype=loss.dtype)
            excess = logs.exp_()
            excess.scatter_(1, targets, excess.gather(1, targets) - 1)
            gradient[:, :-1] += excess.T @ inputs
            gradient[:, -1] += excess.sum(dim=0)
        self._last = weights, ranks.total(loss) / self.examples, ranks.total(gradient) / self.examples
        return self._last[1:]

    def _classifier(self, gradient: float, steps: int) -> Classifier:
        weight = self.mean.new_zeros(self.classes, len(self.mean))
        bias = self.mean.new_full((self.classes,), -torch.inf)
        weight[self.seen] = (self._weights[:, :-1] @ self._axes.T).to(weight)
        bias[self.seen] = self._weights[:, -1].to(bias)
        return Classifier(weight, bias, self.mean, self.scale, gradient, steps)


def sum_of(parts: Iterable[Tensor]) -> Tensor:
    """The sum in float64."""
    return cast(Tensor, sum(part.double() for part in parts))
