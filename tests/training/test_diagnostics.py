"""Signs of collapse, against other ways to compute them; what is kept of a step that was not finite."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harmony.chance import Chance
from harmony.data.batch import Batch, Mask
from harmony.training.diagnostics import Watch, complaint, effective_rank, feature_signs, memory_gib, plain
from harmony.training.distributed import TrainingError


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), seed=st.integers(0, 1000), double=st.booleans())
def test_effective_rank_is_the_exponential_of_the_entropy_of_singular_values(
    rows: int, columns: int, seed: int, double: bool
):
    matrix = np.random.default_rng(seed).standard_normal((rows, columns)) * [10.0 ** (-i % 3) for i in range(columns)]
    values = np.linalg.svd(matrix, compute_uv=False)
    share = values / values.sum()
    expected = math.exp(-sum(p * math.log(p) for p in share if p > 0))
    found = effective_rank(torch.from_numpy(matrix if double else matrix.astype(np.float32)))
    assert found.dtype == (torch.float64 if double else torch.float32)
    assert float(found) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_effective_rank_counts_directions_that_are_used_alike(count: int):
    basis = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0][:count]
    assert float(effective_rank(basis.repeat(5, 1))) == pytest.approx(count, rel=1e-4)


def test_features_that_all_look_alike_have_rank_one_and_no_spread():
    same = feature_signs(torch.randn(1, 32).expand(64, 32) * torch.rand(64, 1))
    assert float(same["rank"]) == pytest.approx(1, abs=1e-3)
    assert float(same["std"]) == pytest.approx(0, abs=1e-3)


def test_features_that_spread_evenly_have_a_std_of_one():
    even = feature_signs(torch.randn(4096, 32, generator=torch.Generator().manual_seed(0)))
    assert float(even["std"]) == pytest.approx(1, abs=0.02)
    assert float(even["rank"]) > 31


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_features_without_information_have_rank_zero_and_raise_nothing(value: float):
    assert float(effective_rank(torch.full((4, 3), value))) == 0
    assert float(feature_signs(torch.full((4, 3), value))["rank"]) == 0


def test_complaints_name_losses_before_gradients():
    assert complaint({"clip": 1.0, "mae": 2.0}, {"image": 3.0}) is None
    assert complaint({"clip": 1.0, "mae": math.nan}, {"image": math.nan}) == "the loss of mae is not finite"
    assert complaint({"clip": math.inf, "mae": -math.inf}, {}) == "the loss of clip and of mae is not finite"
    assert complaint({"clip": 1.0}, {"image": math.inf, "text": 1.0}) == "the gradient of image is not finite"


def _batch(count: int = 3) -> Batch:
    return Batch(
        keys=[f"picture-{i}" for i in range(count)],
        chance=Chance(torch.arange(count)),
        images={"global": torch.rand(2, count, 3, 4, 4)},
        captions={"caption": torch.ones(count, 5, dtype=torch.int64)},
        texts={"caption": ["a red square"] * count},
        masks={"block": Mask.of(torch.ones(2, count, 4, dtype=torch.bool))},
    )


def test_a_saved_batch_is_plain_and_complete(tmp_path: Path):
    torch.save(plain(_batch()), tmp_path / "batch.pt")
    batch = torch.load(tmp_path / "batch.pt", weights_only=True)
    assert batch["keys"] == ["picture-0", "picture-1", "picture-2"]
    assert torch.equal(batch["chance"]["keys"], torch.arange(3))
    assert batch["masks"]["block"]["masked"].all()
    assert batch["texts"]["caption"][0] == "a red square"


def test_only_steps_in_a_row_count(tmp_path: Path):
    watch = Watch(most=1)
    for step in (1, 3, 5):
        assert "its update is left out" in watch.skip(tmp_path / "bad", step, "the loss of mae is not finite", True, [])
        watch.fine()
    assert watch.skipped == 3
    watch.skip(tmp_path / "bad", 7, "the loss of mae is not finite", True, [])
    with pytest.raises(
        TrainingError, match=r"stopped at step 8: the loss of mae is not finite.* after 1 skipped steps"
    ):
        watch.skip(tmp_path / "bad", 8, "the loss of mae is not finite", True, [])


def test_many_examples_are_named_in_part_and_files_are_bounded(tmp_path: Path):
    watch = Watch(most=100)
    messages = [
        watch.skip(tmp_path / "bad", step, "the loss of mae is not finite", True, [_batch(20)]) for step in range(12)
    ]
    assert "picture-7 and 12 more (saved in " in messages[0]
    assert "picture-8" not in messages[0]
    assert len(list((tmp_path / "bad").iterdir())) == 10
    assert "saved in" not in messages[-1]


def test_memory_is_counted_in_gib():
    before = memory_gib(torch.device("cpu"))
    held = torch.ones(2**28 // 4 * 3)  # 0.75 GiB
    assert before < memory_gib(torch.device("cpu")) < 64
    assert memory_gib(torch.device("cpu")) > held.nbytes / 2**30
