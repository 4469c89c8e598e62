"""Chance for code that draws from global generators, as torchvision's transforms and timm's mixup do."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(*place: int | str) -> Iterator[None]:
    """Within the block, torch, NumPy and random draw what belongs to a place: seed, step, rank, ...

    So a step draws the same whether it comes first after an interruption or last, and in whichever process. The
    generators' states are put back afterwards.
    """
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little")
    before = random.getstate(), np.random.get_state()  # noqa: NPY002 - the generators that others draw from
    with torch.random.fork_rng():
        torch.manual_seed(number & 0x7FFF_FFFF_FFFF_FFFF)
        random.seed(number)
        np.random.seed(number & 0xFFFF_FFFF)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002
