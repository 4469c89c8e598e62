"""How many workers, and the batch maker sent to them."""

import os
import pickle
import resource
from pathlib import Path

import pytest
import torch
from data_files import write_pairs

from harmony.data import workers
from harmony.data.captions import Tokenizer
from harmony.data.maker import BatchMaker, Slot
from harmony.data.masks import RandomPatches
from harmony.data.sources import open_source
from harmony.data.views import ViewConfig


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> "Machine":
    return Machine(monkeypatch, tmp_path)


class Machine:
    """A machine with a given number of cores, share of time, shared memory and ranks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.patch, self.quota = monkeypatch, folder / "cpu.max"
        self.patch.setattr(workers, "QUOTA", self.quota)
        self.has()

    def has(self, cores: int = 8, quota: str = "max 100000", memory: int = 2**40, ranks: int = 1) -> None:
        self.patch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        self.patch.setattr(workers, "shared_memory", lambda: memory)
        self.patch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        self.quota.write_text(quota)


@pytest.mark.parametrize(
    ("cores", "quota", "ranks", "expected"),
    [
        (1, "max 100000", 1, 0),
        (2, "max 100000", 1, 1),
        (8, "max 100000", 1, 7),
        (8, "max 100000", 4, 1),
        (8, "max 100000", 8, 0),
        (128, "max 100000", 1, 16),
        (128, "max 100000", 8, 15),
        (64, "400000 100000", 1, 3),
        (64, "50000 100000", 1, 0),
        (4, "nonsense", 1, 3),
    ],
)
def test_auto_leaves_a_core_to_training(machine: Machine, cores: int, quota: str, ranks: int, expected: int) -> None:
    machine.has(cores=cores, quota=quota, ranks=ranks)
    assert workers.count_workers("auto", 10**6) == expected


def test_auto_keeps_within_shared_memory(machine: Machine) -> None:
    for batch, expected in ((10**6, 7), (4 * 10**6, 4), (16 * 10**6, 1), (10**9, 0)):
        machine.has(memory=64 * 10**6)
        assert workers.count_workers("auto", batch) == expected


def test_a_number_is_taken_as_it_is(machine: Machine) -> None:
    machine.has(cores=1, memory=0)
    assert [workers.count_workers(wanted, 10**9) for wanted in (0, 1, 40)] == [0, 1, 40]


def test_the_limit_of_open_files_is_only_ever_raised() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (600, hard))
        workers.allow_open_files(0)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (600, hard)
        workers.allow_open_files(2)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (768, hard)
        workers.allow_open_files(10**7)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] <= hard or hard == resource.RLIM_INFINITY
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_maker_that_was_sent_by_pickle_makes_the_same(tmp_path: Path) -> None:
    """As where processes are spawned and not forked."""
    maker = BatchMaker(
        source=open_source(write_pairs(tmp_path, 6)),
        views={"global": ViewConfig(size=16, photometric="dino_first")},
        tokenizer=Tokenizer(),
        masks={"random": RandomPatches(view="global")},
        grids={"global": (2, 2)},
        max_pixels=10**6,
        steps=1,
        epoch_steps=1,
        colours=((0.5,) * 3, (0.5,) * 3),
    )
    slot = Slot(0, torch.tensor([4, 1]), torch.tensor([11, 12]))
    one, other = maker[slot].batch, pickle.loads(pickle.dumps(maker))[slot].batch
    assert one.keys == other.keys == ["00004", "00001"]
    assert torch.equal(one.images["global"], other.images["global"])
