"""One step: what may not change its result, precisions, and steps that are not finite."""

import copy
import gc
import math
import weakref
from itertools import islice
from typing import get_args

import pytest
import torch
from runs import HERE, tiny, tiny_trainer, weights

from harmony.schedules import Clock
from harmony.training.process import GarbageByHand, repeatable
from harmony.training.settings import EfficiencyConfig
from harmony.training.step import Stepper
from harmony.training.trainer import Trainer


def _first_step(trainer: Trainer, double: bool = True):
    """Losses and gradients of the first step, in float64."""
    if double:
        trainer.learner.double()
    batches = trainer.loader.batches(0)
    loaded = [next(batches) for _ in range(trainer.recipe.train.accumulate)]
    if double:
        for batch in loaded:
            batch.images = {name: crops.double() for name, crops in batch.images.items()}
    losses, _ = trainer.stepper.backward(loaded, trainer.clock)
    gradients = {name: p.grad for name, p in trainer.learner.named_parameters() if p.grad is not None}
    return {name: float(loss) for name, loss in losses.items()}, gradients


@pytest.fixture(scope="module")
def plain():
    return _first_step(tiny_trainer())


def _every_setting() -> list[tuple[str, ...]]:
    """Each value of each setting under `efficiency:` that is not the default, and all of those that work together."""
    found = []
    for name, field in EfficiencyConfig.model_fields.items():
        values = (True, False) if field.annotation is bool else get_args(field.annotation)
        assert values, f"say how efficiency.{name} is tried"
        found += [(f"efficiency.{name}={value}".lower(),) for value in values if value != field.default]
    together = [("efficiency.backward=joint", f"efficiency.checkpointing={how}") for how in ("pointwise", "blocks")]
    # Where colours are changed, the next test tries; compiled blocks, tests/training/test_plan.py.
    return [one for one in found if not one[0].startswith(("efficiency.augment", "efficiency.compile"))] + together


@pytest.mark.parametrize("settings", _every_setting(), ids=" ".join)
def test_efficiency_changes_no_result(plain, settings: tuple[str, ...]):
    losses, gradients = _first_step(tiny_trainer(*settings))
    assert losses == pytest.approx(plain[0], rel=1e-9)
    assert gradients.keys() == plain[1].keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain[1][name], rtol=1e-9, atol=1e-10)


def test_colours_changed_on_the_device_give_the_same_losses():
    trainers = [tiny_trainer(f"efficiency.augment={where}") for where in ("worker", "device")]
    assert [trainer.stepper.augments for trainer in trainers] == [False, True]
    (worker, _), (device, _) = (_first_step(trainer, double=False) for trainer in trainers)
    assert device == pytest.approx(worker, rel=1e-5)


def test_accumulation_gives_the_same_losses_where_examples_are_not_compared(plain):
    losses, gradients = _first_step(tiny_trainer("train.accumulate=4"))
    alone = {"dino", "ibot", "mae", "text_distillation"}
    assert {name: losses[name] for name in alone} == pytest.approx({n: plain[0][n] for n in alone}, rel=1e-9)
    assert losses["clip"] != pytest.approx(plain[0]["clip"], rel=1e-3), "fewer negatives"
    for name, gradient in gradients.items():
        if name.startswith(("objectives.dino", "objectives.mae", "objectives.text_distillation")):
            torch.testing.assert_close(gradient, plain[1][name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.05), ("fp16", 0.01)])
def test_half_precision_trains_close_to_full_precision(precision: str, tolerance: float):
    trainers = [tiny_trainer(f"train.precision={p}", "optim.lr=0.001") for p in ("fp32", precision)]
    if precision == "fp16":  # begin where nothing overflows, so that no step is left out
        trainers[1].stepper.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    full, half = (list(_steps(trainer, 4)) for trainer in trainers)
    for a, b in zip(full, half, strict=True):
        assert b.losses == pytest.approx(a.losses, rel=tolerance)
        assert b.complaint is None
    before = tiny_trainer()
    trained = trainers[1].learner.student
    assert all(p.dtype == torch.float32 for p in trained.parameters())
    assert not torch.equal(weights(trained.state_dict()), weights(before.learner.student.state_dict()))


def _steps(trainer: Trainer, count: int):
    """Measurements of the first steps."""
    batches = trainer.loader.batches(0)
    for _ in range(count):
        loaded = [next(batches) for _ in range(trainer.recipe.train.accumulate)]
        yield trainer.stepper.step(loaded, trainer.clock, logged=True).read()


def _poison(objective, loss: float):
    """Make an objective's loss a value that is not finite, with gradients that are not either."""
    forward = objective.forward

    def poisoned(batch, encoded, at):
        return {name: value * loss for name, value in forward(batch, encoded, at).items()}

    objective.forward = poisoned


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_leaves_everything_as_it_was(value: float):
    """Weights, teacher, centres and optimiser; and what the step observed does not enter the next step's centres."""
    trainer, spared = tiny_trainer(), tiny_trainer()
    first, second, third = islice(trainer.loader.batches(0), 3)
    trainer.stepper.step([first], trainer.clock)
    before = copy.deepcopy(trainer.learner.state_dict()), copy.deepcopy(trainer.stepper.optimiser.state_dict())
    _poison(trainer.learner.objectives["mae"], value)
    measured = trainer.stepper.step([second], trainer.clock).read()
    assert measured.complaint == "the loss of mae is not finite"
    assert measured.sick
    for name, tensor in trainer.learner.state_dict().items():
        assert torch.equal(tensor, before[0][name]), f"{name} changed"
    after = trainer.stepper.optimiser.state_dict()["state"]
    assert all(
        torch.equal(after[i][key], value) for i, state in before[1]["state"].items() for key, value in state.items()
    )
    assert all(p.grad is None for p in trainer.learner.parameters())
    del trainer.learner.objectives["mae"].forward
    assert trainer.stepper.step([third], trainer.clock).read().complaint is None
    for batch in (first, third):
        spared.stepper.step([batch], spared.clock)
    for name, tensor in spared.learner.state_dict().items():
        assert torch.equal(trainer.learner.state_dict()[name], tensor), name
    centre = "objectives.dino.centre.mean"
    assert not torch.equal(trainer.learner.state_dict()[centre], before[0][centre])


def test_a_gradient_that_is_not_finite_behind_a_finite_loss_names_its_parts():
    trainer = tiny_trainer()
    trainer.learner.student.image.proj.weight.register_hook(lambda gradient: gradient * math.inf)
    before = copy.deepcopy(trainer.learner.state_dict())
    (measured,) = _steps(trainer, 1)
    assert measured.complaint == "the gradient of image is not finite"
    assert all(math.isfinite(loss) for loss in measured.losses.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.learner.state_dict().items())


def test_fp16_lowers_its_scale_when_gradients_overflow_and_leaves_the_step_out():
    trainer = tiny_trainer("train.precision=fp16")
    trainer.stepper.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = copy.deepcopy(trainer.learner.state_dict())
    first, second = _steps(trainer, 2)
    assert first.rates["loss_scale"] == 2.0**40
    assert second.rates["loss_scale"] == 2.0**39
    assert (first.complaint, second.complaint) == (None, None), "the scaler's business"
    after = trainer.learner.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items()), "no update, no teacher, no centre"


def test_fp16_gradients_that_overflow_at_the_least_scale_are_an_error():
    trainer = tiny_trainer("train.precision=fp16")
    trainer.stepper.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-8)
    trainer.learner.student.image.proj.weight.register_hook(lambda gradient: gradient * math.nan)
    (measured,) = _steps(trainer, 1)
    assert measured.complaint == "the gradient of image is not finite"


def test_an_unused_parameter_neither_decays_nor_moves():
    """Without clip, nothing reads the projections into the shared space."""
    trainer = tiny_trainer("objectives.clip=null", "optim.weight_decay=0.4")
    before = copy.deepcopy(trainer.learner.state_dict())
    list(_steps(trainer, 2))
    after = trainer.learner.state_dict()
    assert torch.equal(after["student.image.proj.weight"], before["student.image.proj.weight"])
    assert not torch.equal(after["student.image.trunk.cls_token"], before["student.image.trunk.cls_token"])


def test_prototypes_stay_as_they_are_in_the_first_epoch():
    trainer = tiny_trainer()
    direction = trainer.learner.objectives["dino"].head.prototypes.direction
    for step, frozen in ((0, True), (4, True), (5, False)):
        before = direction.detach().clone()
        batch = next(trainer.loader.batches(step))
        trainer.stepper.step([batch], Clock(step, steps=8, epoch_steps=5))
        assert torch.equal(direction, before) == frozen


def test_a_stepper_needs_no_trainer():
    trainer = tiny_trainer()
    stepper = Stepper(trainer.learner, tiny(), HERE.device)
    assert stepper.step([next(trainer.loader.batches(0))], trainer.clock).read().complaint is None


def test_kernels_are_repeatable_while_a_run_lasts_and_as_before_afterwards():
    memory = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    with repeatable(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not memory.fill_uninitialized_memory
    assert (torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory) == before
    with repeatable(False):
        assert torch.are_deterministic_algorithms_enabled() == before[0]


def test_garbage_is_collected_by_hand_and_by_itself_again_afterwards():
    class Knot:
        def __init__(self) -> None:
            self.itself = self

    gone = []
    with GarbageByHand(every=2) as garbage:
        assert not gc.isenabled()
        weakref.finalize(Knot(), gone.append, 1)
        garbage.step(1)
        assert not gone
        garbage.step(2)
        assert gone
    assert gc.isenabled()


def test_a_moved_learner_has_slow_copies_of_what_it_then_holds():
    """Moving replaces buffers; were those of before still followed, a GPU would be given some tensors of the CPU."""
    learner = tiny_trainer().learner.double()
    held = {id(tensor) for tensor in learner.state_dict(keep_vars=True).values()}
    followed = [*learner._slow._fast, *learner._slow._slow]
    assert any(tensor.ndim == 2 and not tensor.requires_grad for tensor in learner._slow._fast), "lengths of prototypes"
    assert all(id(tensor) in held for tensor in followed)
