"""Several processes, one run: set-up under torchrun, and how ranks agree to stop together.

Started by `torchrun`, every process finds its rank in the environment. Tensors on a GPU cross ranks by NCCL, tensors on
the CPU by gloo. The few numbers that only the hosts need (does anyone want to stop?) go over gloo, and no GPU waits.
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


class TrainingError(Exception):
    """Training cannot go on although the input was well formed. Reported without a traceback, exit status 1."""


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
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it its sums may differ from run to run
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
    """What fails in this block on one rank fails on all; ranks wait for each other at its end.

    The first rank raises the error that the user is to read, the others leave quietly.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    if not agree([error is not None])[0]:
        return
    told = isinstance(error, (UserError, TrainingError))
    first = next((e for e in everyones(error if told else None) if e is not None), None)
    if error is not None and (ranks.is_main() or not told):
        raise error
    raise first if first is not None and ranks.is_main() else StoppedElsewhere()


def everyones(value: Any) -> list[Any]:
    """A small Python value of every rank, in rank order."""
    if ranks.count() == 1:
        return [value]
    values: list[Any] = [None] * ranks.count()
    dist.all_gather_object(values, value)
    return values
