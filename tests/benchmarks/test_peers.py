"""The others' steps do the work that ours does, and the comparison says what it measured."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.peers.compare import NAMES, compare, main, peers
from benchmarks.peers.plain_distillation import Distillation
from benchmarks.step import MIDDLE, Work, prepare, recipe_of

CPU = torch.device("cpu")
IMAGE = "model.image={name: vit_tiny_patch16_224, patch: 8, width: 16, depth: 2, heads: 2, drop_path: 0}"
TEXT = ("model.text={width: 16, layers: 1, heads: 2, context: 16, activation: gelu}", "model.embed=16")
HEAD = "objectives.dino.head={prototypes: 24, hidden: 16, bottleneck: 8}"
LOCAL = "views.local={count: 2, size: 16}"
SMALL = {
    "clip": [IMAGE, *TEXT, "views.global.size=32"],
    "mae": [IMAGE, "views.global.size=32", "objectives.mae.decoder={width: 16, depth: 1, heads: 2}"],
    "dino": [IMAGE, "views.global.size=32", LOCAL, HEAD],
    "ibot": [IMAGE, "views.global.size=32", LOCAL, HEAD],
}


def work_of(name: str) -> Work:
    recipe = peers()[name].recipe
    return prepare(recipe_of(recipe, SMALL[recipe], None, 4, "fp32"), CPU)


def our_losses(work: Work, number: int = 0) -> dict[str, float]:
    losses, _ = work.stepper.backward([work.batches[number]], MIDDLE)
    return {name: float(loss) for name, loss in losses.items()}


@pytest.mark.parametrize("name", NAMES)
def test_both_train_as_many_weights(name: str):
    """But for what a pass of ours may need and this one does not: mask tokens, the projection of images."""
    work = work_of(name)
    theirs = peers()[name].build(work)
    learner = work.stepper.learner
    spare = {id(learner.student.image.mask_token), *(id(p) for p in learner.student.image.proj.parameters())}
    used = {id(p): p.numel() for p in learner.parameters() if p.requires_grad and id(p) not in spare}
    trained = sum(tensor.numel() for tensor in theirs.kept() if tensor.requires_grad)
    assert sum(used.values()) == pytest.approx(trained, rel=0.03)


def test_open_clip_computes_our_loss_from_our_weights():
    work = work_of("clip")
    theirs = peers()["clip"].build(work)
    assert float(theirs.step(1)) == pytest.approx(our_losses(work, 1)["clip"], rel=1e-4)


@pytest.mark.parametrize("tokens", ["all", "needed"])
def test_plain_parts_compute_our_losses_from_our_weights(tokens: str):
    work = work_of("ibot")
    plain, learner = Distillation(work, tokens), work.stepper.learner  # type: ignore[arg-type]
    for network, towers, head in (
        (plain.student, learner.student, learner.objectives["dino"].head),
        (plain.teacher, learner.teacher, learner.objectives["dino"].teacher_head),
    ):
        network.vit.load_state_dict(towers.image.trunk.state_dict())
        network.mask_token.data.copy_(towers.image.mask_token)
        ours_by_order = list(head.parameters())
        assert len(ours_by_order) == len(list(network.head.parameters()))
        for p in network.head.parameters():
            p.data.copy_(next(q for q in ours_by_order if q.shape == p.shape and _take(ours_by_order, q)))
    batch = work.batches[0]
    found = plain.loss(batch.images["global"], batch.images["local"], batch.masks["block"].masked)
    assert found.item() == pytest.approx(sum(our_losses(work).values()), rel=1e-4)


def _take(owners: list, one: torch.Tensor) -> bool:
    owners.pop(next(i for i, each in enumerate(owners) if each is one))
    return True


@pytest.mark.parametrize("name", NAMES)
def test_their_step_updates_their_weights(name: str):
    work = work_of(name)
    theirs = peers()[name].build(work)
    before = [p.clone() for p in theirs.kept() if p.requires_grad]
    assert all(torch.isfinite(theirs.step(number)) for number in range(2))
    after = [p for p in theirs.kept() if p.requires_grad]
    moved = sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert moved >= len(before) - 2


def test_numbers_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "peers.json"
    main(["clip", *SMALL["clip"], "--arch=", "--batch=4", "--rounds=3", "--warmup=1", "--device=cpu", f"--json={out}"])
    (found,) = json.loads(out.read_text())
    assert len(found["ours"]["steps_s"]) == len(found["theirs"]["steps_s"]) == 3
    assert found["times"] == pytest.approx(found["theirs"]["step_s"] / found["ours"]["step_s"])
    low, middle, high = found["times_by_round"]
    assert 0 < low <= middle <= high
    assert found["ours"]["kept_gib"] > found["theirs"]["kept_gib"] > 0, "ours keeps a slow copy too"
    assert "open_clip" in capsys.readouterr().out


def test_what_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = compare("mae", CPU, SMALL["mae"], None, 4, "fp32")
    assert found == {"peer": "mae", "left_out": "transformers is not installed"}


def test_an_unknown_peer_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["clipp"])
    assert "no peer is called 'clipp'" in capsys.readouterr().err
