"""What a step found: on the device while it runs, plain numbers once they are read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harmony.training.diagnostics import complaint

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


class Numbers:
    """The numbers of a step, on their way from the device to the host.

    Nothing waits for them until `read`, and that waits for their own step alone: while the host looks at the numbers of
    one step, the device is at work on the next.
    """

    def __init__(
        self,
        own: Mapping[str, Tensor],
        joined: Tensor,
        norms: Mapping[str, Tensor],
        scale: Tensor | None,
        weights: dict[str, float],
        rates: dict[str, float],
    ) -> None:
        """Begin the transfer.

        Args:
            own: this rank's losses by name, scalars.
            joined: (losses,), their means over ranks, in the same order.
            norms: norm of the gradient by part, scalars.
            scale: the loss scale of the step in fp16.
            weights: see `Measured`.
            rates: likewise, without the loss scale.
        """
        self._losses, self._parts, self._scaled = list(own), list(norms), scale is not None
        self._weights, self._rates = weights, rates
        scales = [] if scale is None else [scale]
        numbers = torch.cat([torch.stack([*own.values()]), joined, torch.stack([*norms.values(), *scales])])
        self._event: torch.cuda.Event | None = None
        if numbers.device.type == "cuda":
            # Into pinned memory, or the copy would wait for the device.
            self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._numbers = numbers

    def read(self) -> Measured:
        """Wait until the step is done, and say what it found."""
        if self._event is not None:
            self._event.synchronize()
        own, joined, norms, rest = self._named(self._numbers.tolist())
        rates = self._rates | ({"loss_scale": rest[0]} if self._scaled else {})
        problem = complaint(joined, norms)
        if complaint(joined, {}) is None:
            # Only the gradient is to blame. That is how fp16's scaler finds its scale; else any rank may be the cause.
            sought = self._scaled and rates["loss_scale"] > _LEAST_SCALE
            return Measured(joined, self._weights, norms, rates, None if sought else problem, sick=True)
        return Measured(joined, self._weights, norms, rates, problem, sick=complaint(own, {}) is not None)

    def _named(
        self, numbers: Sequence[float]
    ) -> tuple[dict[str, float], dict[str, float], dict[str, float], Sequence[float]]:
        losses, parts = len(self._losses), len(self._parts)
        return (
            dict(zip(self._losses, numbers[:losses], strict=True)),
            dict(zip(self._losses, numbers[losses : 2 * losses], strict=True)),
            dict(zip(self._parts, numbers[2 * losses : 2 * losses + parts], strict=True)),
            numbers[2 * losses + parts :],
        )
