"""What every test shares."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The suite runs in several processes (pytest -n), so each keeps to one thread; it also makes sums repeatable.
torch.set_num_threads(1)

# The same examples each time: a failure seen once is seen again. No deadline: machines differ.
settings.register_profile("harmony", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("harmony")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the project."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        message = "needs the real data in ../shared, which is not here"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return folder
