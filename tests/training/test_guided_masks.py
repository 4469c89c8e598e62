"""Masks that are drawn from the teacher's attention: the attention, the mask, and what a plan makes of them."""

import pytest
import torch
from parts import ALL, CLOCK, HEAD, batch_of, learner_of, losses_of
from shrunk import shrunk
from steps import real_batch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from harmony.data.batch import Mask
from harmony.errors import UserError
from harmony.models.encodings import ImageEncoding
from harmony.models.settings import ImageConfig
from harmony.models.vision import ImageTower, Segment
from harmony.objectives.base import GuidedMask, ImageRequest
from harmony.objectives.registry import kinds
from harmony.schedules import Clock
from harmony.training.cost import cost_of
from harmony.training.learner import build_learner
from harmony.training.memory import memory_of
from harmony.training.plan import encode

DETAIL = {"decoder": {"heads": 2}, "head": HEAD, "side": 1}


def explicit_attention(tower: ImageTower, pixels: torch.Tensor) -> torch.Tensor:
    """(B, N): the blocks made to use timm's own kernel that keeps its weights."""
    weights, hooks = [], []
    for block in tower.trunk.blocks:
        block.attn.fused_attn = False
        hooks.append(block.attn.attn_drop.register_forward_hook(lambda _m, _i, out: weights.append(out)))
    tower.trunk.forward_features(pixels)
    for hook in hooks:
        hook.remove()
    return sum(each.mean(1)[:, 0, tower.prefix :] for each in weights) / len(weights)


@pytest.mark.parametrize("registers", [0, 3])
def test_attention_is_timms_and_is_the_same_in_a_packed_pass(registers: int):
    torch.manual_seed(0)
    config = ImageConfig(
        name="vit_tiny_patch16_224", patch=8, width=32, depth=3, heads=2, registers=registers, drop_path=0.0
    )
    tower = ImageTower(config, 32, embed=8).double().eval()
    large, small = (torch.randn(count, 3, side, side, dtype=torch.float64) for count, side in ((2, 32), (3, 16)))
    expected = explicit_attention(tower, large)
    [alone] = tower.encode_packed([Segment(large, attention=True)])
    other, packed = tower.encode_packed([Segment(small), Segment(large, attention=True)])
    assert other.attention is None and tower.encode(large).attention is None
    for encoding in (alone, packed):
        assert encoding.attention.shape == (2, 16) and not encoding.attention.requires_grad
        assert torch.allclose(encoding.attention, expected, rtol=1e-10)
    assert torch.allclose(alone.tokens, tower.encode(large).tokens, rtol=1e-12)


def test_a_mask_from_places_kept_is_the_one_from_its_booleans():
    kept = torch.rand(2, 3, 10).argsort(-1)[..., :4].sort(-1).values
    mask = Mask.keeping(kept, 10)
    expected = Mask.of(mask.masked, equal_counts=True)
    assert int(mask.masked.sum()) == 2 * 3 * 6
    for field in ("masked", "index", "kept"):
        assert torch.equal(getattr(mask, field), getattr(expected, field)), field


def test_the_most_attended_patches_stay():
    learner = learner_of({"detailclip": DETAIL})
    batch = batch_of(learner)
    slow = encode(learner.plan.teacher, learner.teacher, batch)
    mask = learner.plan.with_guided(batch, slow).masks["attended"]
    weights = slow.image(GuidedMask("global", 8, (4, 4)).request).attention
    assert mask.kept.shape == (2, len(batch), 8) and "attended" not in batch.masks
    least_kept = weights.masked_fill(mask.masked, 1).amin(-1)
    assert (least_kept >= weights.masked_fill(~mask.masked, 0).amax(-1)).all()
    # What an image keeps is its own, whatever batch it is in.
    fewer = batch_of(learner, examples=2)
    fewer.images = {name: crops[:, 1:3] for name, crops in batch.images.items()}
    alone = learner.plan.with_guided(fewer, encode(learner.plan.teacher, learner.teacher, fewer))
    assert torch.equal(alone.masks["attended"].kept, mask.kept[:, 1:3])


def test_squares_of_patches_stay_or_go_as_one():
    """6 x 4 patches in squares of 2 x 2: the two with the largest sums stay, though other patches are larger alone."""
    weights = torch.zeros(6, 4)
    weights[0, 0] = 0.9  # alone in its square
    weights[0:2, 2:4] = 0.3
    weights[4:6, 0:2] = 0.25
    encoding = ImageEncoding(torch.zeros(1, 1, 25, 8), 1, 25, lambda x: x, attention=weights.view(1, 1, 24))
    mask = GuidedMask("global", 8, (6, 4), side=2).draw(encoding)
    assert mask.kept.tolist() == [[[2, 3, 6, 7, 16, 17, 20, 21]]]
    assert sorted(mask.index.tolist()) == [n for n in range(24) if n not in mask.kept.flatten().tolist()]
    alone = GuidedMask("global", 8, (6, 4)).draw(encoding)
    assert alone.kept.tolist() == [[[0, 2, 3, 6, 7, 16, 17, 20]]], "of equal weights the first stay"


def test_requests_that_differ_in_attention_are_one_pass():
    learner = learner_of({"detailclip": DETAIL, "clip": {"hard_weight": 0.4}, "dino": {"head": HEAD}})
    [merged] = learner.plan.teacher.images
    assert merged == ImageRequest("global", crops=(0, 1), model="teacher", attention=True)


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_sequential_and_joint_plans_agree(drop_path: float):
    found = []
    objectives = ALL | {"clip": {"keep": "attended"}, "detailclip": DETAIL}
    for joint in (False, True):
        learner = learner_of(objectives, joint, drop_path)
        for group in learner.losses_by_group(batch_of(learner), CLOCK):
            group.total().backward()
        found.append([p.grad for p in learner.parameters() if p.requires_grad])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-9, atol=1e-13)


def test_an_objective_of_weight_0_lends_its_guided_mask():
    learner = learner_of({"clip": {"keep": "attended"}, "detailclip": DETAIL})
    without = learner_of({"clip": {"keep": "attended"}, "detailclip": DETAIL | {"weight": 0}})
    expected, found = (losses_of(each, batch_of(each)) for each in (learner, without))
    assert set(found) == {"clip"} and torch.allclose(found["clip"], expected["clip"], rtol=1e-12)
    unused = learner_of({"clip": {}, "detailclip": DETAIL | {"weight": 0}})
    assert not unused.plan.teacher and not unused.plan.guided, "what nobody uses is not drawn"


def test_a_guided_mask_cannot_guide_the_teacher(monkeypatch: pytest.MonkeyPatch):
    clip = kinds()["clip"]
    monkeypatch.setattr(clip, "requests", lambda _: [ImageRequest("global", model="teacher", keep="attended")])
    with pytest.raises(UserError, match="hides patches from the teacher"):
        learner_of({"clip": {}, "detailclip": DETAIL})


@pytest.mark.parametrize(
    ("objectives", "words"),
    [
        ({"clip": {"keep": "attended"}}, "which no objective of this recipe draws"),
        ({"detailclip": DETAIL, "b": DETAIL | {"type": "detailclip"}}, "draws a mask 'attended', as another one does"),
        ({"detailclip": DETAIL, "clip": {"view": "plain", "keep": "attended"}}, "drawn on 'global'"),
    ],
)
def test_guided_masks_that_do_not_fit_are_refused(objectives: dict, words: str):
    with pytest.raises(UserError, match=words):
        learner_of(objectives)


def test_cost_and_memory_are_rehearsed():
    """Without contents, too, a guided mask has its shape; the parts add up to a real step."""
    recipe = shrunk("detailclip")
    learner = build_learner(recipe)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for group in learner.losses_by_group(real_batch(recipe, learner, caption_tokens=12), Clock(0, 1000, 100)):
            group.total().backward()
    counted = cost_of(recipe, caption_tokens=12)
    assert counted.flops * recipe.data.batch_size == pytest.approx(counter.get_total_flops(), rel=2e-3)
    assert sum(counted.flops_of(part) for part in counted.heads) == pytest.approx(counted.flops, rel=1e-9)
    assert memory_of(recipe).total > 0
