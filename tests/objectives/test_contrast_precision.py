"""Objectives that compare images, under bf16 autocast: finite gradients, and nearly the loss of full precision."""

import pytest
import torch
from parts import batch_of, learner_of, losses_of

HEAD = {"hidden": 16, "output": 8, "layers": 3}
OBJECTIVES = {
    "simclr": {"head": HEAD},
    "supcon": {"head": HEAD},
    "vicreg": {"head": HEAD},
    "swav": {"head": HEAD, "prototypes": 24, "queue": 7, "queue_after": 0},
    "mocov3": {"head": HEAD | {"norm": "all"}, "predictor": {"hidden": 16}},
    "densecl": {"head": HEAD, "dense_head": HEAD, "queue": 7},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_bf16(name: str):
    learner = learner_of({name: OBJECTIVES[name]}).float()
    batch = batch_of(learner, examples=16)
    batch.images = {view: crops.float() for view, crops in batch.images.items()}
    batch.labels = torch.arange(16) % 3
    full = losses_of(learner, batch)[name]
    with torch.autocast("cpu", torch.bfloat16):
        half = losses_of(learner, batch)[name]
    assert half.dtype == torch.float32
    assert float(half.detach()) == pytest.approx(float(full.detach()), rel=0.05) and not torch.equal(half, full)
    half.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in learner.parameters())
