"""AdamW's groups, the schedules of its numbers, and clipping."""

import copy
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import tiny
from torch import nn

from harmony.errors import UserError
from harmony.schedules import Clock, Duration
from harmony.training.learner import build_learner
from harmony.training.optimiser import Gradients, adamw, decays, learning_rate, set_rates
from harmony.training.settings import OptimConfig

# Every kind of parameter of a learner: a pattern of its name, whether it decays, whether it does so as published.
TABLE = [
    (r"student\.image\.mask_token", False, True),
    (r"student\.image\.trunk\.(cls|reg)_token", False, True),
    (r"student\.image\.trunk\.pos_embed", False, True),
    (r".*norm\d?\.(weight|bias)", False, False),
    (r".*ln_(1|2|final)\.(weight|bias)", False, False),
    (r".*(patch_embed\.proj|qkv|attn\.proj|fc1|fc2)\.weight", True, True),
    (r".*(patch_embed\.proj|qkv|attn\.proj|fc1|fc2)\.bias", False, False),
    (r"student\.image\.proj\.weight", True, True),
    (r"student\.text\.mask_token", False, True),
    (r"student\.text\.transformer\.positional_embedding", False, True),
    (r"student\.text\.transformer\.text_projection", True, True),
    (r"student\.text\.transformer\.token_embedding\.weight", True, True),
    (r".*attn\.in_proj_weight", True, True),
    (r".*attn\.in_proj_bias", False, False),
    (r".*(out_proj|c_fc|c_proj)\.weight", True, True),
    (r".*(out_proj|c_fc|c_proj)\.bias", False, False),
    (r"objectives\.(clip|siglip)\.logit_scale", False, True),
    (r"objectives\.siglip\.logit_bias", False, True),
    (r"objectives\.\w+\.head\.mlp\.\d\.weight", True, True),
    (r"objectives\.\w+\.head\.mlp\.\d\.bias", False, False),
    (r"objectives\.\w+\.head\.prototypes\.direction", True, True),
    (r"objectives\.mae\.decoder\.mask_token", False, True),
    (r"objectives\.(mae|mlm)\.decoder\.(embed|pixels|words)\.weight", True, True),
    (r"objectives\.(mae|mlm)\.decoder\.(embed|pixels|words)\.bias", False, False),
]


@pytest.fixture(scope="module")
def learner() -> nn.Module:
    return build_learner(tiny("model.image.registers=2", "objectives.siglip={weight: 1}"))


@pytest.mark.parametrize(("rule", "column"), [("weights_only", 1), ("published", 2)])
def test_every_parameter_decays_as_the_table_says(learner: nn.Module, rule: str, column: int):
    used = set()
    for name, parameter in learner.named_parameters():
        if not parameter.requires_grad:
            continue
        rows = [row for row in TABLE if re.fullmatch(row[0], name)]
        assert len(rows) == 1, f"{name} fits {len(rows)} rows"
        assert decays(name, parameter, rule) == rows[0][column], name
        used.add(rows[0])
    assert len(used) == len(TABLE)


@pytest.mark.parametrize("rule", ["weights_only", "published"])
def test_groups_hold_each_trained_parameter_once_and_no_frozen_one(learner: nn.Module, rule: str):
    model = copy.deepcopy(learner)
    for parameter in model.student.text.parameters():
        parameter.requires_grad_(False)
    groups = adamw(model, OptimConfig(decay=rule)).param_groups
    held = [name for group in groups for name in group["param_names"]]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(held) == sorted(trained)
    assert not any(name.startswith(("student.text", "teacher.")) or "teacher_head" in name for name in held)
    expected = {name for name, p in model.named_parameters() if p.requires_grad and decays(name, p, rule)}
    assert {name for group in groups if group["decays"] for name in group["param_names"]} == expected


def test_nothing_to_train_is_an_error():
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(UserError, match="every parameter is frozen"):
        adamw(model, OptimConfig())


def test_updates_are_those_of_the_paper():
    """Three steps against Loshchilov and Hutter's algorithm 2, written out, on a decaying and a spared tensor."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    optim = OptimConfig(betas=(0.9, 0.98), eps=1e-6)
    optimiser = adamw(model, optim)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step, (lr, decay) in enumerate([(0.1, 0.3), (0.2, 0.2), (0.05, 0.5)], start=1):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            first[name] = 0.9 * first[name] + 0.1 * parameter.grad
            second[name] = 0.98 * second[name] + 0.02 * parameter.grad**2
            mean, square = first[name] / (1 - 0.9**step), second[name] / (1 - 0.98**step)
            shrunk = expected[name] * (1 - lr * decay) if name == "weight" else expected[name]
            expected[name] = shrunk - lr * mean / (square.sqrt() + 1e-6)
        set_rates(optimiser, lr, decay)
        optimiser.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-12, atol=1e-12)


def test_learning_rate_rises_to_the_scaled_peak_and_falls_along_a_cosine_to_the_end():
    optim = OptimConfig(lr=5e-4, final_lr=1e-6, warmup=Duration(amount=2, unit="epochs"))
    rates = [learning_rate(optim, Clock(step, 50, 5), batch_size=1024) for step in range(50)]
    peak = 5e-4 * 1024 / 256
    assert rates[:10] == pytest.approx([peak * (step + 1) / 10 for step in range(10)])
    expected = [1e-6 + (peak - 1e-6) * (1 + math.cos(math.pi * done / 40)) / 2 for done in range(1, 41)]
    assert rates[10:] == pytest.approx(expected)
    assert rates[-1] == pytest.approx(1e-6)


@given(
    steps=st.integers(1, 60),
    warmup=st.one_of(
        st.builds(Duration, amount=st.floats(0, 100), unit=st.just("%")),
        st.builds(Duration, amount=st.floats(0, 1), unit=st.just("steps")),
    ),
)
def test_learning_rate_of_any_run_is_above_zero_has_one_peak_and_ends_at_final_lr(steps: int, warmup: Duration):
    optim = OptimConfig(lr=1e-3, final_lr=1e-6, warmup=warmup)
    rates = [learning_rate(optim, Clock(step, steps, 7), batch_size=256) for step in range(steps)]
    assert all(0 < rate <= 1e-3 * (1 + 1e-12) for rate in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    if warmup.steps(Clock(0, steps, 7)) <= steps - 1:
        assert rates[-1] == pytest.approx(1e-6)


def _with_gradients(model: nn.Module, scale: float) -> nn.Module:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "norm" not in name:  # some have none, as frozen prototypes have
            parameter.grad = scale * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("scale", [1e-5, 1.0])
def test_clipping_and_norms_are_those_of_torch(learner: nn.Module, scale: float):
    ours, theirs = (_with_gradients(copy.deepcopy(learner), scale) for _ in range(2))
    gradients = Gradients(ours.parts(), OptimConfig(clip_norm=3.0))
    norms = gradients.norms()
    by_part = dict(zip(gradients.parts, gradients.by_part(norms).tolist(), strict=True))
    assert set(by_part) == {"image", "text", "clip", "siglip", "dino", "mae", "mlm", "text_distillation"}
    for part, parameters in ours.parts().items():
        expected = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        assert by_part[part] == pytest.approx(float(expected), rel=1e-5)
    gradients.clip(norms)
    total = nn.utils.clip_grad_norm_([p for p in theirs.parameters() if p.requires_grad], 3.0)
    assert math.sqrt(sum(norm**2 for norm in by_part.values())) == pytest.approx(float(total), rel=1e-5)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-9)


def test_published_clipping_is_by_tensor_and_of_the_image_tower_alone(learner: nn.Module):
    ours, before = (_with_gradients(copy.deepcopy(learner), 1.0) for _ in range(2))
    gradients = Gradients(ours.parts(), OptimConfig(clip_norm=3.0, clip_scope="image_tensors"))
    gradients.clip(gradients.norms())
    image = {id(p) for p in ours.student.image.parameters()}
    shortened = 0
    for (name, a), (_, b) in zip(ours.named_parameters(), before.named_parameters(), strict=True):
        if a.grad is None:
            continue
        if id(a) not in image:
            assert torch.equal(a.grad, b.grad), name
            continue
        expected = b.grad * min(1.0, 3.0 / (float(b.grad.norm()) + 1e-6))
        torch.testing.assert_close(a.grad, expected, rtol=1e-5, atol=1e-9)
        shortened += not torch.equal(a.grad, b.grad)
    assert 0 < shortened < len(image), "some are long and some are short"


def test_no_clipping_leaves_gradients_alone(learner: nn.Module):
    ours, before = (_with_gradients(copy.deepcopy(learner), 10.0) for _ in range(2))
    gradients = Gradients(ours.parts(), OptimConfig(clip_norm=None))
    gradients.clip(gradients.norms())
    for a, b in zip(ours.parameters(), before.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)
