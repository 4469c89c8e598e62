"""Token-wise contrast on two ranks, whose captions have different lengths, is that of one process."""

from pathlib import Path

import pytest
import torch
from parts import batch_of, gradients, learner_of, losses_of
from runs import Processes

from harmony.data.batch import Batch
from harmony.training import distributed


def part_of(batch: Batch, which: slice) -> Batch:
    """Some of the examples, their captions cut to the longest of them, as a rank's loader gives them."""
    captions = batch.captions["caption"][which]
    captions = captions[:, : int((captions > 0).sum(1).max())]
    images = {name: crops[:, which] for name, crops in batch.images.items()}
    return Batch(batch.keys[which], batch.chance, images, captions={"caption": captions})


def _rank(out: Path) -> None:
    with distributed.session() as place:
        learner = learner_of({"filip": {}})
        batch = part_of(batch_of(learner, examples=4), slice(2 * place.rank, 2 * place.rank + 2))
        loss = losses_of(learner, batch)["filip"]
        torch.save((loss.detach(), gradients(loss, learner), batch.captions["caption"].shape[1]), f"{out}.{place.rank}")


def test_two_ranks_are_one_process_on_the_joined_batch(tmp_path: Path):
    """Their captions have different lengths."""
    Processes(_rank, tmp_path / "found", ranks=2, output=tmp_path / "printed").finish()
    losses, found, lengths = zip(*(torch.load(f"{tmp_path}/found.{rank}") for rank in range(2)), strict=True)
    learner = learner_of({"filip": {}})
    alone = losses_of(learner, batch_of(learner, examples=4))["filip"]
    assert lengths[0] != lengths[1]
    assert float(sum(losses) / 2) == pytest.approx(float(alone.detach()), rel=1e-12)
    for one, two, expected in zip(*found, gradients(alone, learner), strict=True):
        torch.testing.assert_close((one + two) / 2, expected, rtol=1e-9, atol=1e-12)
