"""Gradients that leave while backward still runs are those that all leave after it; what crosses ranks in a step."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Processes
from runs import tiny
from torch import Tensor, nn

from benchmarks import crossings
from harmony import ranks
from harmony.data.batch import Batch
from harmony.training import distributed
from harmony.training.reduction import Reduction
from harmony.training.trainer import Trainer

WIDTH = 4
USUAL = ("deep", "shallow", "gathered")
STEPS = {
    "first": USUAL,
    "second": USUAL,
    "third": USUAL,
    "more than before": (*USUAL, "shallow"),
    "as often": (*USUAL, "shallow"),
    "less than before": ("deep", "gathered"),
    "others": ("shallow", "extra"),
    "others again": ("shallow", "extra"),
    "none": (),
    "as at first": USUAL,
    "last": USUAL,
}
"""Name -> the losses that run backward one after the other."""

LATE = ("more than before", "less than before", "others", "none", "as at first")
"""Steps that are not what the one before them was."""


class Layers(nn.Module):
    """Layers that losses reach in different numbers; nothing reaches `unused`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.extra = nn.Linear(WIDTH, WIDTH)
        self.unused = nn.Linear(WIDTH, WIDTH)

    def loss(self, name: str, x: Tensor) -> Tensor:
        shallow = self.layers[1](self.layers[0](x))
        if name == "shallow":
            return shallow.sum()
        if name == "extra":
            return self.extra(shallow).sum()
        deep = self.layers[3](self.layers[2](shallow))
        if name == "deep":
            return (deep * x).sum()
        every = ranks.gather(deep)
        return (every * torch.arange(len(every))[:, None]).sum() + ranks.summed(shallow.sum()) * 3


def _layers(whole: bool) -> tuple[Layers, Tensor]:
    """The same layers on all ranks and this rank's input: whole numbers, of which sums are exact, or any."""
    torch.manual_seed(5)
    layers, x = Layers(), torch.randn(ranks.count(), 3, WIDTH)[ranks.rank()]
    if whole:
        x = (3 * x).round()
        for parameter in layers.parameters():
            parameter.data = (4 * parameter.data).round()
    return layers, x


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def _steps(layers: Layers, x: Tensor, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Gradients after each step, how many reductions left before its end, and what left in all."""
    reduction = Reduction(list(layers.parameters()), bucket_bytes=100)
    for name in names:
        layers.zero_grad()
        with crossings.counted() as found:
            reduction.begin()
            for loss in STEPS[name]:
                layers.loss(loss, x).backward()
            early = sum(one.part == "gradients" for one in found)
            reduction.finish()
        sent = [one.bytes for one in found if one.part == "gradients"]
        yield {"gradients": _gradients(layers), "early": early, "sent": sent}


def _plain(layers: Layers, x: Tensor, name: str) -> dict[str, Tensor]:
    layers.zero_grad()
    for loss in STEPS[name]:
        layers.loss(loss, x).backward()
    ranks.average_gradients(list(layers.parameters()))
    return _gradients(layers)


def _three(out: Path) -> None:
    with distributed.session() as place:
        (layers, x), (others, _) = _layers(whole=True), _layers(whole=True)
        found = {"plain": {name: _plain(others, x, name) for name in STEPS}}
        found["left"] = dict(zip(STEPS, _steps(layers, x, list(STEPS)), strict=True))
        layers, x = _layers(whole=False)
        *_, found["after others"] = _steps(layers, x, ["first", "others", "less than before", "last", "last"])
        *_, found["alone"] = _steps(_layers(whole=False)[0], x, ["last"])
        torch.save(found, f"{out}.{place.rank}")


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three ranks found."""
    folder = tmp_path_factory.mktemp("three")
    Processes(_three, folder / "found", ranks=3, output=folder / "printed").finish()
    return [torch.load(folder / f"found.{rank}", weights_only=True) for rank in range(3)]


@pytest.mark.parametrize("step", STEPS)
def test_gradients_are_those_of_one_reduction_after_all_backward_passes(three, step: str):
    for found in three:
        plain, left = found["plain"][step], found["left"][step]["gradients"]
        assert left.keys() == plain.keys()
        assert all(torch.equal(left[name], plain[name]) for name in plain)
    assert all(torch.equal(three[0]["left"][step]["gradients"][n], g) for n, g in left.items()), "the same on all ranks"


@pytest.mark.parametrize("step", STEPS)
def test_gradients_leave_once_and_before_the_end_when_a_step_is_as_expected(three, step: str):
    for found in three:
        left = found["left"][step]
        size = sum(gradient.nbytes for gradient in left["gradients"].values())
        if step == "first" or step in LATE:
            sent = left["sent"][left["early"] :]
            assert sum(sent) == size, "all of them, after the end"
        else:
            sent = left["sent"]
            assert sum(sent) == size
            assert left["early"] == len(sent)
        assert not sent or max(sent) <= 100
        assert left["sent"] == three[0]["left"][step]["sent"], "the same reductions on all ranks"


def test_what_a_step_gives_does_not_depend_on_the_steps_before(three):
    for found in three:
        left, alone = found["after others"], found["alone"]
        assert left["early"] and not alone["early"]
        assert all(torch.equal(left["gradients"][name], gradient) for name, gradient in alone["gradients"].items())


SETTINGS = {
    "sequential": ("train.accumulate=2", "efficiency.checkpointing=blocks"),
    "joint": ("efficiency.backward=joint",),
    "left out": ("train.precision=fp16",),
}
"""How a step runs; in the last one its gradient overflows."""


def _averaged(trainer: Trainer, loaded: Sequence[Batch], early: bool) -> dict[str, Tensor]:
    """The gradients of a step that is not made, reduced while its backward passes run or after them."""
    stepper = trainer.stepper
    if early:
        stepper.reduction.begin()
    stepper.backward(loaded, trainer.clock)
    if early:
        stepper.reduction.finish()
    else:
        ranks.average_gradients(stepper.gradients.parameters)
    gradients = _gradients(trainer.learner)
    stepper.optimiser.zero_grad()
    trainer.learner.after_update(trainer.clock, 1.0, torch.tensor(False))
    return gradients


def _counted(variant: str, place: distributed.Place) -> dict[str, Any]:
    """What crosses ranks in a step that is as expected and not logged."""
    trainer = Trainer(tiny(*SETTINGS[variant]), place)
    stepper, batches = trainer.stepper, trainer.loader.batches(0)
    stepper.reduction = Reduction(stepper.gradients.parameters, bucket_bytes=5_000)
    stepper.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, enabled=variant == "left out")
    loaded = [next(batches) for _ in range(trainer.recipe.train.accumulate)]
    stepper.step(loaded, trainer.clock)
    if variant == "left out":
        same = True  # two gradients that are not finite cannot be compared
    else:
        plain, early = (_averaged(trainer, loaded, early) for early in (False, True))
        same = plain.keys() == early.keys() and all(torch.equal(early[name], plain[name]) for name in plain)
    with crossings.counted() as found:
        measured = stepper.step(loaded, trainer.clock).read()
    parts = crossings.by_part(found)
    return {"parts": parts, "same": same, "gradients": stepper.gradients.bytes, "losses": len(measured.losses)}


def _two(out: Path) -> None:
    with distributed.session() as place:
        torch.save({variant: _counted(variant, place) for variant in SETTINGS}, f"{out}.{place.rank}")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks counted."""
    folder = tmp_path_factory.mktemp("two")
    Processes(_two, folder / "found", ranks=2, output=folder / "printed").finish()
    return [torch.load(folder / f"found.{rank}", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("variant", SETTINGS)
def test_gradients_cross_once_and_besides_them_only_what_losses_need(two, variant: str):
    recipe = tiny(*SETTINGS[variant])
    micro, number = recipe.train.accumulate, 4  # bytes of a number
    pairs, width = recipe.data.batch_size // 2 // micro, recipe.model.embed
    centres = [recipe.objectives[name].head.prototypes + 1 for name in ("dino", "dino", "text_distillation")]
    for found in (counted[variant] for counted in two):
        embeddings = pairs * width * number
        parts = dict(found["parts"])
        gradients = parts.pop("gradients: all_reduce")
        assert gradients["bytes"] == found["gradients"]
        assert gradients["calls"] > 10
        expected = {
            # Embeddings of both kinds, the student's and the teacher's; what all ranks' losses find for the student's.
            "objectives/clip: all_gather": {"calls": 4 * micro, "bytes": 4 * micro * embeddings},
            "losses: backward: all_reduce": {"calls": 2 * micro, "bytes": 2 * micro * 2 * embeddings},
            "objectives/mlm: all_reduce": {"calls": micro, "bytes": micro * number},  # how many words are hidden
            "objectives/targets: all_reduce": {"calls": 3, "bytes": sum(centres) * number},
            "training/step: all_reduce": {"calls": 1, "bytes": found["losses"] * number},
        }
        assert parts == expected


@pytest.mark.parametrize("variant", ["sequential", "joint"])
def test_gradients_of_a_recipe_are_to_the_last_bit_those_of_one_reduction(two, variant: str):
    assert [found[variant]["same"] for found in two] == [True, True]


def test_what_goes_around_a_ring():
    assert crossings.Crossing("", "all_reduce", 100).sent(4) == 150
    assert crossings.Crossing("", "all_gather", 100).sent(4) == 300
    assert crossings.Crossing("", "broadcast", 100).sent(4) == 100
