"""Chance as data: random numbers that are a function of who asks, not of when.

A number is found by hashing (seed, epoch, example, name, position), so every example owns a stream that depends neither
on the number of workers or ranks nor on the device, and a resumed run draws the same numbers with no generator's state.
The hash is the finaliser of SplitMix64 (Steele, Lea and Flood, 2014) in wrapping 64-bit integers, which torch computes
identically on every device.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.uint64]


def _signed(value: int) -> int:
    """The 64-bit pattern of `value` as the signed integer that torch stores."""
    return (value + 2**63) % 2**64 - 2**63


_STEP, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift (torch shifts signed integers arithmetically)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX_2)
    return x ^ _shift(x, 31)


def _mix_here(x: Words) -> Words:
    """The same on the host, where numpy takes a quarter of torch's time for the few numbers of most draws."""
    x = (x ^ (x >> _WORDS[30])) * _WORDS[_MIX_1]
    x = (x ^ (x >> _WORDS[27])) * _WORDS[_MIX_2]
    return x ^ (x >> _WORDS[31])


_WORDS = {value: np.uint64(value) for value in (27, 30, 31, 40, _STEP, _MIX_1, _MIX_2)}


@lru_cache(maxsize=64)
def _positions(count: int) -> Words:
    """The first `count` multiples of the step, from one on."""
    return np.arange(1, count + 1, dtype=np.uint64) * _WORDS[_STEP]


@lru_cache(maxsize=4096)
def _name_key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def _words_here(keys: Tensor, name: int, count: int) -> Tensor:
    """The first `count` whole numbers below 2^24 of each stream's branch of that name, (B, count) float32."""
    stream = _mix_here(keys.numpy().view(np.uint64) ^ np.uint64(name % 2**64))
    return torch.from_numpy((_mix_here(stream[:, None] + _positions(count)) >> _WORDS[40]).astype(np.float32))


def _words_there(keys: Tensor, name: int, count: int) -> Tensor:
    """The same where the keys are, on any device."""
    positions = torch.arange(1, count + 1, dtype=torch.int64, device=keys.device) * _signed(_STEP)
    return _shift(_mix(_mix(keys ^ name)[:, None] + positions), 40).to(torch.float32)


@dataclass(frozen=True)
class Chance:
    """The random streams of B examples, one each.

    Attributes:
        keys: (B,) int64, one stream an example; equal keys give equal numbers.
    """

    keys: Tensor

    @classmethod
    def of_examples(cls, seed: int, epoch: int, examples: Tensor) -> "Chance":
        """The streams of the examples with the given indices (B,) in one epoch of a run with one seed."""
        run = _mix(torch.tensor(_signed(seed * 2 + 1)) * _signed(_STEP) + epoch)
        return cls(_mix(_mix(examples.to(torch.int64) * _signed(_STEP)) ^ run))

    def uniform(self, name: str, *shape: int) -> Tensor:
        """Numbers in [0, 1), float32, (B, *shape). The same name always gives the same numbers."""
        count = math.prod(shape)
        here = self.keys.device.type == "cpu" and type(self.keys) is Tensor  # a fake tensor has no numbers
        words = _words_here if here else _words_there
        return words(self.keys, _name_key(name), count).mul_(2.0**-24).view(len(self.keys), *shape)

    def integers(self, name: str, below: Tensor | int, *shape: int) -> Tensor:
        """Whole numbers in [0, below), int64, (B, *shape); `below` broadcasts against (B, *shape)."""
        drawn = (self.uniform(name, *shape).double() * below).floor().to(torch.int64)
        return torch.minimum(drawn, torch.as_tensor(below, device=drawn.device) - 1)

    def permutation(self, name: str, count: int) -> Tensor:
        """A random order of 0 .. count-1 an example, int64, (B, count)."""
        return self.uniform(name, count).argsort(dim=1, stable=True)

    def branches(self, names: Sequence[str]) -> "Chance":
        """The streams of len(names) * B things, names outermost: one for each crop of each example, say."""
        return Chance(torch.cat([_mix(self.keys ^ _name_key(name)) for name in names]))

    def to(self, device: torch.device | str) -> "Chance":
        return Chance(self.keys.to(device, non_blocking=True))

    def __len__(self) -> int:
        return len(self.keys)
