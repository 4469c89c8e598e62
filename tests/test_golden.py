"""Fidelity: the package's own towers, objectives, plan and teacher reproduce recorded steps of the published code.

Every step in the directory named by HARMONY_GOLDEN (default ../shared/golden) is run, and the copy in tests/golden.
"""

import math
import os
from pathlib import Path

import pytest
import torch
from golden_steps import GoldenStep, read_golden
from torch import Tensor

from harmony.interchange.published import objectives_from_published, towers_from_published
from harmony.models.positions import sine_cosine_positions

ROOT = Path(__file__).parents[1]
OWN = Path(__file__).parent / "golden"
GIVEN = Path(os.environ.get("HARMONY_GOLDEN", ROOT.parent / "shared" / "golden"))
STEMS = sorted({path.with_suffix("") for place in (OWN, GIVEN) for path in place.glob("*.npz")})
TOLERANCE = 1e-9

FAMILIES = {
    "discriminative": ("dino", "ibot"),
    "contrastive": ("clip",),
    "generative": ("mae",),
    "text": ("mlm", "text_distillation"),
}


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture(params=STEMS, ids=lambda stem: f"{stem.parent.parent.name}-{stem.name}")
def golden(request: pytest.FixtureRequest) -> GoldenStep:
    return read_golden(request.param)


def test_the_given_directory_holds_steps():
    if not GIVEN.is_dir():
        assert os.environ.get("CI") != "true" and "HARMONY_GOLDEN" not in os.environ, f"{GIVEN} is missing"
        pytest.skip("no ../shared/golden beside the project: only the copy in tests/golden is checked")
    assert list(GIVEN.glob("*.npz"))


def test_losses(golden: GoldenStep):
    losses = {}
    for group in golden.learner.losses_by_group(golden.batch, golden.clock):
        losses |= {name: group.weights[name] * float(loss) for name, loss in group.losses.items()}
    expected = {
        "dino": golden.losses["dino_cls"],
        "ibot": golden.losses["ibot_patch"],
        "clip": golden.losses["contrastive"],
        "mae": golden.losses["generative"],
        "mlm": golden.losses["mlm"],
        "text_distillation": golden.losses["text_distillation"],
    }
    assert losses == pytest.approx(expected, rel=TOLERANCE)
    for family, names in FAMILIES.items():
        assert sum(losses[name] for name in names) == pytest.approx(golden.losses[family], rel=TOLERANCE)


def test_schedules(golden: GoldenStep):
    clip = golden.learner.objectives["clip"]
    assert clip.config.hard_weight(golden.clock) == pytest.approx(golden.losses["hard_weight"], rel=TOLERANCE)


def test_soft_targets_alone(golden: GoldenStep):
    from harmony.schedules import Schedule

    clip = golden.learner.objectives["clip"]
    clip.config = clip.config.model_copy(update={"hard_weight": Schedule.constant(0.0)})
    (loss,) = [
        g.losses["clip"] for g in golden.learner.losses_by_group(golden.batch, golden.clock) if "clip" in g.losses
    ]
    assert float(loss) == pytest.approx(golden.losses["clip_soft_unscaled"], rel=TOLERANCE)


def test_gradients(golden: GoldenStep):
    """The gradient of each family alone, for every weight whose gradient was recorded."""
    checked = 0
    for group in golden.learner.losses_by_group(golden.batch, golden.clock):
        golden.learner.zero_grad()
        group.total().backward()
        (family,) = [family for family, names in FAMILIES.items() if set(names) == set(group.objectives)]
        prefix = f"grad.{family}."
        for name in golden.arrays:
            if name.startswith(prefix):
                assert relative_error(gradient(golden, name[len(prefix) :]), golden.array(name)) < TOLERANCE, name
                checked += 1
    assert checked == sum(name.startswith("grad.") for name in golden.arrays) > 0


def gradient(golden: GoldenStep, published_name: str) -> Tensor:
    """Our gradient of the weight that the published code calls `published_name`, found through the loader's own map.

    The map is followed by giving it a state dict in which every number of every weight is its own address.
    """
    state = {}
    for name, value in golden.arrays.items():
        if name.startswith("state."):
            marked = name == f"state.{published_name}"
            size = value.size
            state[name[6:]] = (torch.arange(1.0, size + 1, dtype=torch.float64) if marked else torch.zeros(size)).view(
                value.shape
            )
    found = torch.zeros(state[published_name].numel(), dtype=torch.float64)
    named = {f"student.{k}": v for k, v in towers_from_published(state).items()}
    named |= {f"objectives.{k}": v for k, v in objectives_from_published(state).items()}
    parameters = dict(golden.learner.named_parameters())
    for name, addresses in named.items():
        hit = addresses > 0
        if hit.any() and parameters[name].requires_grad:
            found[addresses[hit].long() - 1] += parameters[name].grad[hit]
    return found.view(state[published_name].shape)


def test_outputs(golden: GoldenStep):
    towers, batch = golden.learner.student, golden.batch
    with torch.no_grad():
        whole = towers.image.encode(batch.images["global"][0]).tokens
        local = towers.image.encode(batch.images["local"][0]).tokens
        text = towers.text(batch.captions["caption"])
        from harmony.models.vision import Segment

        masked = towers.image.encode_packed(
            [Segment(batch.images["global"][0], replace=batch.masks["block"].masked[0])]
        )
    assert relative_error(whole, golden.array("output.student_tokens.global0")) < TOLERANCE
    assert relative_error(local, golden.array("output.student_tokens.local0")) < TOLERANCE
    assert relative_error(masked[0].tokens, golden.array("output.student_tokens.masked0")) < TOLERANCE
    assert relative_error(text, golden.array("output.text_embedding")) < TOLERANCE


def test_centres(golden: GoldenStep):
    list(golden.learner.losses_by_group(golden.batch, golden.clock))
    golden.learner.after_update(golden.clock, 1.0, torch.tensor(True))
    for name, recorded in (("dino", "center.cls.after"), ("ibot", "center.patch.after")):
        ours = golden.learner.objectives[name].centre.mean
        assert relative_error(ours, golden.array(recorded).reshape(-1)) < TOLERANCE


def test_joint_plan_gives_the_same_losses_and_gradients(golden: GoldenStep):
    stem = next(s for s in STEMS if read_config(s) == golden.config)
    joint = read_golden(stem, joint=True)
    for step in (golden, joint):
        for group in step.learner.losses_by_group(step.batch, step.clock):
            group.total().backward()
    assert len(joint.learner.plan.groups) == 1 < len(golden.learner.plan.groups)
    ours = dict(golden.learner.named_parameters())
    for name, parameter in joint.learner.named_parameters():
        assert (parameter.grad is None) == (ours[name].grad is None), name
        if parameter.grad is not None and parameter.grad.norm() > 1e-12:
            assert relative_error(ours[name].grad, parameter.grad) < TOLERANCE, name


def read_config(stem: Path) -> dict:
    import json

    return json.loads(stem.with_suffix(".json").read_text())["config"]


def test_decoder_positions_are_ours(golden: GoldenStep):
    """The recorded decoder positions come from the file; a new decoder's own must be the same."""
    side = golden.config["image"] // golden.config["patch_size"]
    recorded = golden.array("state.generative_path.decoder_pos_embed")[0, 1:]
    ours = sine_cosine_positions(golden.config["decoder_width"], (side, side))
    assert torch.allclose(ours.float(), recorded.float(), atol=1e-6)


def test_teacher_follows_the_student(golden: GoldenStep):
    """One update: slow <- m * slow + (1 - m) * fast, for every pair of weights."""
    momentum = 0.9
    learner = golden.learner
    fast = {n: p.detach().clone() for n, p in learner.student.named_parameters()}
    slow = {n: p.clone() for n, p in learner.teacher.named_parameters()}
    head, slow_head = (learner.objectives["dino"].head, learner.objectives["dino"].teacher_head)
    expected_head = momentum * slow_head.mlp[0].weight + (1 - momentum) * head.mlp[0].weight.detach()
    learner.after_update(golden.clock, momentum, torch.tensor(True))
    for name, parameter in learner.teacher.named_parameters():
        assert torch.allclose(parameter, momentum * slow[name] + (1 - momentum) * fast[name], rtol=1e-12, atol=1e-14), (
            name
        )
    assert torch.allclose(slow_head.mlp[0].weight, expected_head, rtol=1e-12)
    assert not math.isclose(float(slow["image.proj.weight"].norm()), float(learner.teacher.image.proj.weight.norm()))
