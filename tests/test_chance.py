"""Counted random numbers: distribution, independence, and dependence on nothing but who asks."""

import hashlib

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from harmony.chance import Chance, _name_key, _words_there

EXAMPLES = torch.arange(4000)


def splitmix(x: int) -> int:
    """The finaliser of SplitMix64 in Python's whole numbers."""
    mask = 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


@given(st.integers(-(2**63), 2**63 - 1))
def test_the_hash_is_splitmix64(value: int):
    from harmony.chance import _mix

    ours = int(_mix(torch.tensor([value]))[0]) % 2**64
    assert ours == splitmix(value % 2**64)


@given(st.integers(0, 2**40), st.integers(0, 10**6), st.text(max_size=9), st.integers(1, 5), st.integers(1, 4))
def test_numbers_are_the_plain_hash_of_who_asks_on_the_host_and_on_a_device(seed, epoch, name, rows, columns):
    """Written out in Python's whole numbers; and the device's way, on tensors, which the host does not take."""
    examples = torch.arange(7, 7 + rows)
    chance = Chance.of_examples(seed, epoch, examples)
    mask, step = 2**64 - 1, 0x9E3779B97F4A7C15
    run = splitmix(((seed * 2 + 1) * step + epoch) & mask)
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    expected = []
    for example in examples.tolist():
        stream = splitmix(splitmix(splitmix(example * step & mask) ^ run) ^ key)
        expected += [(splitmix((stream + n * step) & mask) >> 40) / 2**24 for n in range(1, columns + 1)]
    assert chance.uniform(name, columns).flatten().tolist() == expected
    there = _words_there(chance.keys, _name_key(name), columns) / 2**24
    assert there.flatten().tolist() == expected


def test_numbers_are_uniform():
    drawn = Chance.of_examples(0, 0, EXAMPLES).uniform("x", 25).numpy()
    assert drawn.min() >= 0 and drawn.max() < 1
    counts, _ = np.histogram(drawn, bins=50, range=(0, 1))
    expected = drawn.size / 50
    assert ((counts - expected) ** 2 / expected).sum() < 100  # chi-square with 49 degrees of freedom: 1 in 30,000


def test_neighbours_and_names_and_epochs_and_seeds_are_independent():
    base = Chance.of_examples(3, 5, EXAMPLES)
    a = base.uniform("a", 4)
    others = {
        "name": base.uniform("b", 4),
        "epoch": Chance.of_examples(3, 6, EXAMPLES).uniform("a", 4),
        "seed": Chance.of_examples(4, 5, EXAMPLES).uniform("a", 4),
        "example": Chance.of_examples(3, 5, EXAMPLES + 1).uniform("a", 4),
        "branch": base.branches(["left"]).uniform("a", 4),
        "position": a.roll(1, dims=1),
    }
    for what, b in others.items():
        correlation = np.corrcoef(a.flatten().numpy(), b.flatten().numpy())[0, 1]
        assert abs(correlation) < 0.04, what


@given(st.integers(0, 10**6), st.integers(0, 1000), st.permutations(range(6)))
def test_a_number_belongs_to_its_example_not_to_its_place(seed: int, epoch: int, order: list[int]):
    examples = torch.tensor([3, 14, 15, 92, 65, 35])
    whole = Chance.of_examples(seed, epoch, examples).uniform("x", 3, 2)
    assert torch.equal(Chance.of_examples(seed, epoch, examples[order]).uniform("x", 3, 2), whole[order])
    assert torch.equal(Chance.of_examples(seed, epoch, examples[:1]).uniform("x", 3, 2), whole[:1])


def test_integers_and_permutations():
    chance = Chance.of_examples(0, 0, EXAMPLES)
    drawn = chance.integers("n", 7, 3)
    assert drawn.min() == 0 and drawn.max() == 6 and drawn.dtype == torch.int64
    below = torch.arange(1, 4001)
    assert (chance.integers("m", below) < below).all()
    order = chance.permutation("p", 5)
    assert torch.equal(order.sort(dim=1).values, torch.arange(5).expand(4000, -1))
    first = torch.bincount(order[:, 0], minlength=5)
    assert (first - 800).abs().max() < 120


def test_branches_lie_outermost():
    chance = Chance.of_examples(0, 0, torch.arange(3))
    both = chance.branches(["a", "b"])
    assert torch.equal(both.keys[:3], chance.branches(["a"]).keys)
    assert torch.equal(both.keys[3:], chance.branches(["b"]).keys)
    assert len(both.keys.unique()) == 6
