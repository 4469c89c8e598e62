"""What a training run sets in its Python process for as long as it lasts."""

import ctypes
import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_LARGE = 16 * 2**20  # smaller blocks cost more page faults than they save memory (docs/performance.md)


def give_back_large_blocks() -> None:
    """Have the C library return blocks of 16 MiB and more to the system as soon as they are freed.

    glibc raises that limit to 32 MiB by itself once such blocks were freed, and keeps the holes they leave: a
    twentieth of a step's peak on a CPU. Holds for the rest of the process; C libraries without `mallopt` stay as they
    are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)


@contextmanager
def repeatable(wanted: bool) -> Iterator[None]:
    """Have torch choose kernels that give the same bits every time, where it has such.

    Without it, sums over several threads or on a GPU may be taken in another order each time. What has no such kernel
    (on a GPU, the gradient of resized positions) runs as it is.
    """
    if not wanted:
        yield
        return
    enabled, only_warned = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation")
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=only_warned)
        memory.fill_uninitialized_memory = filled


class GarbageByHand:
    """Python's garbage collector, called every so many steps; else it would halt one rank or another at any time."""

    def __init__(self, every: int = 100) -> None:
        self._every = every

    def __enter__(self) -> "GarbageByHand":
        gc.collect()
        gc.freeze()
        gc.disable()
        return self

    def __exit__(self, *_: object) -> None:
        gc.enable()
        gc.unfreeze()

    def step(self, step: int) -> None:
        """Step `step` is done."""
        if step % self._every == 0:
            gc.collect()
