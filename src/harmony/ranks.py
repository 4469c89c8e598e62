"""Everything that crosses ranks, in one place; without a process group each function is the identity.

A rank is one process of a data-parallel run. Losses are written as local means whose average over ranks is the loss of
the joined batch, so gradients averaged over ranks are the gradients of that loss.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor


def count() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank, 0 in a single-process run."""
    return dist.get_rank() if count() > 1 else 0


def is_main() -> bool:
    return rank() == 0


def gather(local: Tensor) -> Tensor:
    """(B, ...) of every rank, joined to (ranks * B, ...) in rank order; gradients flow back to their rank."""
    if count() == 1:
        return local
    return cast(Tensor, _Gather.apply(local))


class _Gather(torch.autograd.Function):
    """Every rank's loss depends on every rank's part: a part's gradient is the sum of what all ranks find for it."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        ctx.size = len(local)
        parts = [torch.empty_like(local) for _ in range(count())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return total(gradient)[rank() * ctx.size : (rank() + 1) * ctx.size]


def summed(local: Tensor) -> Tensor:
    """The sum over ranks, with gradients back to every rank; `total` is the one without."""
    if count() == 1:
        return local
    return cast(Tensor, _Summed.apply(local))


class _Summed(torch.autograd.Function):
    """Every rank's loss depends on the same sum: what all ranks find for it flows back to each."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        return total(local)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return total(gradient)


def total(local: Tensor) -> Tensor:
    """The sum over ranks, detached from the graph."""
    summed = local.detach().clone()
    if count() > 1:
        dist.all_reduce(summed)
    return summed


def mean(local: Tensor) -> Tensor:
    """The mean over ranks, detached from the graph."""
    return total(local) / count()


def maximum(local: Tensor) -> Tensor:
    """The largest value over ranks, element by element, detached from the graph."""
    largest = local.detach().clone()
    if count() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def average_gradients(parameters: Sequence[torch.nn.Parameter], bucket_bytes: int = 64 * 2**20) -> None:
    """Average `.grad` over ranks, in place, in as few reductions as buckets of `bucket_bytes` allow.

    Parameters without a gradient are left out; which ones these are must not differ between ranks, so the graph of a
    loss must not depend on the data (an empty mask gives a loss of zero, not a missing one).
    """
    if count() == 1:
        return
    for bucket in buckets([parameter for parameter in parameters if parameter.grad is not None], bucket_bytes):
        Averaging([parameter.grad for parameter in bucket if parameter.grad is not None]).finish()


class Averaging:
    """One reduction of several gradients laid end to end, on its way from the moment this is made."""

    def __init__(self, gradients: Sequence[Tensor]) -> None:
        """Send them off.

        Args:
            gradients: of one dtype and device; they keep their values until `finish`.
        """
        self._gradients = list(gradients)
        self._flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        self._work = dist.all_reduce(self._flat, async_op=True)

    def finish(self) -> None:
        """Wait for it and give the gradients the means over ranks, in place."""
        self.drop()
        self._flat /= count()
        pieces = self._flat.split([gradient.numel() for gradient in self._gradients])
        torch._foreach_copy_(self._gradients, [p.view_as(g) for p, g in zip(pieces, self._gradients, strict=True)])

    def drop(self) -> None:
        """Wait for it and leave the gradients as they are."""
        if self._work is not None:
            self._work.wait()


def buckets(parameters: Sequence[torch.nn.Parameter], limit: int) -> list[list[torch.nn.Parameter]]:
    """Runs of parameters of one dtype and device that take at most `limit` bytes together (or a single one)."""
    found: list[list[torch.nn.Parameter]] = []
    size = 0
    for parameter in parameters:
        fits = found and size + parameter.nbytes <= limit
        alike = found and (found[-1][0].dtype, found[-1][0].device) == (parameter.dtype, parameter.device)
        if not (fits and alike):
            found.append([])
            size = 0
        found[-1].append(parameter)
        size += parameter.nbytes
    return found


def broadcast(tensors: Sequence[Tensor]) -> None:
    """Give every rank the first rank's values, in place."""
    if count() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)
