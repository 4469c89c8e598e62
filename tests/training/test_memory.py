"""The memory of a step, against what real steps keep."""

import torch
from steps import real_batch, tiny

from harmony.schedules import Clock
from harmony.training.learner import build_learner
from harmony.training.memory import memory_of


def test_memory_holds_what_a_real_step_keeps_for_backward() -> None:
    recipe = tiny("data.batch_size=16")
    learner = build_learner(recipe)
    batch = real_batch(recipe, learner, caption_tokens=12)
    own = {tensor.untyped_storage().data_ptr() for tensor in learner.state_dict().values()}
    kept: dict[tuple[str, ...], int] = {}
    groups = learner.losses_by_group(batch, Clock(0, 1000, 100))
    while True:
        saved: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor, saved: dict[int, torch.Tensor] = saved) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            group = next(groups, None)
        if group is None:
            break
        kept[group.objectives] = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
        group.total().backward()
    memory = memory_of(recipe, caption_tokens=12)
    assert set(memory.groups) == set(kept)
    gradients = sum(p.nbytes for p in learner.parameters() if p.requires_grad)
    for name, counted in memory.groups.items():
        assert kept[name] <= counted <= 2 * kept[name] + 2 * gradients
    assert memory.weights == sum(tensor.nbytes for tensor in learner.state_dict().values())


def fullest(*overrides: str) -> int:
    recipe = tiny(
        "data.batch_size=64", "model.image.depth=4", "model.image.width=64", "views.global.size=64", *overrides
    )
    return max(memory_of(recipe, caption_tokens=12).groups.values())


def test_what_should_save_memory_does() -> None:
    plain = fullest("efficiency.backward=sequential")
    assert fullest("efficiency.backward=joint") > plain
    some = fullest("efficiency.checkpointing=pointwise")
    assert fullest("efficiency.checkpointing=blocks") < 0.9 * some < 0.9 * 0.9 * plain
    assert fullest("train.precision=bf16") < 0.9 * plain
    assert fullest("train.accumulate=4") < plain
