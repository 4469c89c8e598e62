"""Chance for code that draws from global generators, as torchvision's transforms and timm's mixup do."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def number(*place: int | str) -> int:
    """A number of 63 bits that belongs to a place: seed, step, rank, ...; other places have unrelated ones."""
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & 0x7FFF_FFFF_FFFF_FFFF


def generator(*place: int | str) -> torch.Generator:
    """A generator on the CPU that belongs to a place."""
    return torch.Generator().manual_seed(number(*place))


@contextmanager
def seeded(*place: int | str) -> Iterator[None]:
    """Within the block, torch, NumPy and random draw what belongs to a place: seed, step, rank, ...

    So a step draws the same whether it comes first after an interruption or last, and in whichever process. The
    generators' states are put back afterwards.
    """
    seed = number(*place)
    before = random.getstate(), np.random.get_state()  # noqa: NPY002 - the generators that others draw from
    # A worker forked from a process that uses a GPU must not touch it; this process's own GPU is the only one to seed.
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        for _ in devices:
            torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed & 0xFFFF_FFFF)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002
