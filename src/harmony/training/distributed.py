"""Several processes, one run: set-up under torchrun, and how ranks agree to stop together.

Started by `torchrun`, every process finds its rank in the environment. Tensors on a GPU cross ranks by NCCL, tensors on
the CPU by gloo; the few numbers that only the hosts need (does anyone want to stop?) go over gloo, so that no GPU waits.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from harmony import ranks
from harmony.errors import UserError


class StoppedElsewhere(SystemExit):
    """Another rank failed and says why; this one only leaves."""

    def __init__(self) -> None:
        super().__init__(1)


@dataclass(frozen=True)
class Place:
    """Where this process runs: its device, its rank and the number of ranks."""

    device: torch.device
    rank: int
    ranks: int


@contextmanager
def session() -> Iterator[Place]:
    """Join the other processes when torchrun started this one; leave them at the end.

    A process group that exists already is used as it is.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local} has no GPU of its own: this machine has {torch.cuda.device_count()}; "
                "start as many processes as GPUs (torchrun --nproc-per-node)"
            )
        torch.cuda.set_device(local)
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    ours = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1
    if ours:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Place(device, ranks.rank(), ranks.count())
    finally:
        if ours:
            dist.destroy_process_group()


def agree(values: Sequence[float]) -> list[float]:
    """The sum of each value over ranks, exchanged between hosts."""
    return ranks.total(torch.tensor(values, dtype=torch.float64)).tolist() if ranks.count() > 1 else list(values)


@contextmanager
def together() -> Iterator[None]:
    """What fails in this block on one rank fails on all: that rank raises its error, the others `StoppedElsewhere`.

    Ranks wait for each other at the end of the block.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    if agree([error is not None])[0]:
        raise error or StoppedElsewhere()


def everyones(value: Any) -> list[Any]:
    """A small Python value of every rank, in rank order."""
    if ranks.count() == 1:
        return [value]
    values: list[Any] = [None] * ranks.count()
    dist.all_gather_object(values, value)
    return values


def first_ranks(value: Any) -> Any:
    """The first rank's value, on every rank."""
    return everyones(value)[0]
