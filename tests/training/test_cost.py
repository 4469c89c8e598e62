"""The cost of a recipe, against hand calculation and against real steps."""

import io
from functools import cache

import pytest
from rich.console import Console
from steps import real_batch, tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from harmony import recipe as recipes
from harmony.errors import UserError
from harmony.schedules import Clock
from harmony.training.cost import Cost, Pass, cost_of
from harmony.training.cost_tables import tables
from harmony.training.learner import build_learner


@cache
def vit_base() -> Cost:
    return cost_of(recipes.resolve("harmony", ["data.batch_size=8"]), caption_tokens=77)


def named(cost: Cost, model: str, **wanted: object) -> Pass:
    [found] = [
        one
        for one in cost.passes
        if one.model == model and all(getattr(one.request, name, "absent") == value for name, value in wanted.items())
    ]
    return found


def vit_macs(
    tokens: int, patches: int, trained: bool, pooled: bool = False, width: int = 768, depth: int = 12, patch: int = 16
) -> int:
    """Multiply-adds of a ViT by hand.

    A block has 12 D^2 weights and multiplies N x N with N x D twice. Backward takes twice as much again, except that
    pixels need no gradient. When only the class token is read, the last block makes keys and values of all tokens, and
    everything else (10 D^2, and the attention) of one.
    """
    blocks = depth * (12 * tokens * width**2 + 2 * tokens**2 * width)
    if pooled:
        blocks -= (tokens - 1) * (10 * width**2 + 2 * tokens * width)
    pixels = patches * width * 3 * patch**2
    return 3 * blocks + 2 * pixels if trained else blocks + pixels


@pytest.mark.parametrize(
    ("found", "by_hand"),
    [
        (dict(model="student", view="global", crops=(0,)), vit_macs(197, 196, trained=True, pooled=True)),
        (dict(model="student", replace="block"), 2 * vit_macs(197, 196, trained=True)),
        # Positions are resized once for all of the batch's 8 images, forward and backward.
        (
            dict(model="student", view="local"),
            8 * vit_macs(37, 36, trained=True, pooled=True) + 2 * 36 * 196 * 768 // 8,
        ),
        (dict(model="student", keep="mae"), 2 * vit_macs(50, 196, trained=True)),
        (dict(model="teacher", view="global"), 2 * vit_macs(197, 196, trained=False)),
    ],
    ids=["clip's crop", "masked crops", "local crops", "kept patches", "teacher"],
)
def test_image_passes_equal_a_hand_calculation(found: dict[str, object], by_hand: int) -> None:
    counted = named(vit_base(), **found)  # type: ignore[arg-type]
    assert counted.flops == pytest.approx(2 * by_hand, rel=1e-6)


def test_tokens_are_counted() -> None:
    cost = vit_base()
    assert named(cost, "student", replace="block").tokens == 2 * 197
    assert named(cost, "student", view="local").tokens == 8 * 37
    assert named(cost, "student", keep="mae").tokens == 2 * 50
    assert named(cost, "teacher", stream="caption").tokens == 77


def test_mae_decoder_equals_a_hand_calculation() -> None:
    n, width, depth = 197, 512, 8
    decoder = depth * 3 * (12 * n * width**2 + 2 * n**2 * width)
    decoder -= 3 * 50 * (10 * width**2 + 2 * n * width)  # the last block makes only the removed patches
    ends = 3 * (50 * 768 * width + 147 * width * 768)
    assert vit_base().heads["mae"] == pytest.approx(2 * 2 * (decoder + ends), rel=2e-3)


def test_an_eighth_of_the_published_cost_is_gone() -> None:
    # The published code takes about 399 GMAC a pair at these settings, of which 11 % can go with the same results:
    # a teacher pass on one crop, heads on tokens nobody reads, and a second reading of the captions by the teacher.
    # What last blocks need not make is 3 % more.
    assert vit_base().flops / 2 == pytest.approx(399e9 * 0.86, rel=0.01)


def test_parameters_of_vit_base() -> None:
    cost = vit_base()
    assert cost.trained["image"] == 85_798_656 + 768 + 768 * 512  # timm's vit_base_patch16_224, mask token, projection
    assert cost.trained["clip"] == 1
    towers_and_heads = sum(cost.trained[part] for part in ("image", "text", "dino", "text_distillation"))
    assert cost.slow == towers_and_heads


@pytest.mark.parametrize("backward", ["sequential", "joint"])
def test_parts_add_up_to_a_real_step(backward: str) -> None:
    recipe = tiny(f"efficiency.backward={backward}")
    learner = build_learner(recipe)
    batch = real_batch(recipe, learner, caption_tokens=12)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for group in learner.losses_by_group(batch, Clock(0, 1000, 100)):
            group.total().backward()
    counted = cost_of(recipe, caption_tokens=12)
    assert counted.flops * len(batch) == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert sum(counted.flops_of(name) for name in counted.heads) == pytest.approx(counted.flops, rel=1e-9)


def test_no_matrix_product_is_computed_again_unless_blocks_are() -> None:
    plain, some, whole = (cost_of(tiny(f"efficiency.checkpointing={how}")) for how in ("none", "pointwise", "blocks"))
    assert some.flops == plain.flops < whole.flops


def test_an_objective_left_out_costs_nothing() -> None:
    cost = cost_of(tiny("objectives.mae=null", "objectives.mlm.weight=0"))
    assert set(cost.heads) == {"clip", "dino", "ibot", "text_distillation"}
    assert not any("mlm" in one.asked_by for one in cost.passes)


def test_a_batch_that_cannot_be_spread_is_refused() -> None:
    with pytest.raises(UserError, match="make it a multiple of 3"):
        cost_of(tiny(), processes=3)


def test_the_tables_name_every_objective() -> None:
    out = io.StringIO()
    Console(file=out, width=120).print(tables(cost_of(tiny())))
    text = out.getvalue()
    for name in ("clip", "dino", "ibot", "mae", "mlm", "text_distillation", "GiB"):
        assert name in text


def test_stochastic_depth_is_counted_without_numbers():
    """Its draws have no values while operations are counted, and change no count."""
    deep = "model.image.depth=2"  # the first block drops nothing
    dropping, whole = (cost_of(tiny(deep, f"model.image.drop_path={rate}")) for rate in (0.1, 0.0))
    assert dropping.flops == whole.flops
