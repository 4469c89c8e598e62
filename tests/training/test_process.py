"""What a run sets in its process does what it says; each setting in a process of its own, as nothing takes it back."""

import os
import subprocess
import sys

import pytest

_HOLES = """
import sys
import torch
from harmony.training.process import give_back_large_blocks

def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

if sys.argv[1] == "given back":
    give_back_large_blocks()
before = resident_mib()
large, small = [], []
for _ in range(20):
    large.append(torch.ones(5 * 2**20))  # 20 MiB
    small.append(torch.ones(2**18))  # 1 MiB between two large ones, and it stays
del large
print(resident_mib() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and mallopt is glibc's")
def test_large_blocks_go_back_to_the_system_although_small_ones_stay_between_them() -> None:
    grown = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20)}  # where glibc gets by itself, sooner or later
    kept = {}
    for how in ("given back", "as it is"):
        done = subprocess.run(
            [sys.executable, "-c", _HOLES, how], env=grown, capture_output=True, text=True, check=True
        )
        kept[how] = float(done.stdout)
    assert kept["given back"] < 60  # MiB, of 400 that were freed
    assert kept["as it is"] > 200  # the fault that the setting is there for
