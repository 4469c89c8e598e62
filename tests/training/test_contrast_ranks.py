"""Two processes do what one does on the joined batch: recipes that compare images, balance them, or queue them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Processes
from runs import HERE
from shrunk import shrunk

from harmony.training import distributed
from harmony.training.distributed import Place
from harmony.training.trainer import Trainer

HEAD = "{hidden: 16, output: 8, layers: 3}"
MLP = "{hidden: 16, layers: 2}"
VARIANTS = {
    "simclr": ("simclr", f"objectives.simclr.head={HEAD}"),
    "vicreg": ("vicreg", f"objectives.vicreg.head={HEAD}"),
    "swav": ("swav", f"objectives.swav={{head: {HEAD}, freeze_prototypes: 1 step}}"),
    "swav with a queue": ("swav", f"objectives.swav={{head: {HEAD}, queue: 7, queue_after: 1 step}}"),
    "mocov3": ("mocov3", f"objectives.mocov3={{head: {HEAD}, predictor: {MLP}}}"),
    "mocov3 with a queue": ("mocov3", f"objectives.mocov3={{head: {HEAD}, predictor: {MLP}, queue: 19}}"),
    "densecl": ("densecl", f"objectives.densecl={{head: {HEAD}, dense_head: {HEAD}, queue: 19}}"),
    "densecl by geometry": ("densecl", "objectives.densecl={matching: geometry, queue: 19}"),
    "supcon": ("supcon", f"objectives.supcon.head={HEAD}"),
    "slip": ("slip", f"objectives.simclr.head={HEAD}"),
}
"""Name -> recipe and overrides: with batch norms, which `shrunk` leaves out, as it makes projectors one layer deep."""

SETTINGS = ("train.accumulate=2", "optim={lr: 0.002, clip_norm: 3.0}")


def three_steps(place: Place, variant: str) -> dict[str, Any]:
    """Losses, gradients and state of the first steps, in float64."""
    recipe, *overrides = VARIANTS[variant]
    trainer = Trainer(shrunk(recipe, *SETTINGS, *overrides), place)
    trainer.learner.double()
    batches = trainer.loader.batches(0)
    found: dict[str, Any] = {"losses": [], "gradients": {}}
    clip = trainer.stepper.gradients.clip

    def watched(norms: torch.Tensor) -> None:
        found["gradients"] = {n: p.grad.clone() for n, p in trainer.learner.named_parameters() if p.grad is not None}
        clip(norms)

    trainer.stepper.gradients.clip = watched
    for step in range(3):
        loaded = [next(batches) for _ in range(trainer.recipe.train.accumulate)]
        for batch in loaded:
            batch.images = {name: crops.double() for name, crops in batch.images.items()}
        found["losses"].append(
            trainer.stepper.step(loaded, replace(trainer.clock, step=step), logged=True).read().losses
        )
    found["state"] = trainer.learner.state_dict()
    return found


def _compare(out: Path) -> None:
    with distributed.session() as place:
        assert place.ranks == 2
        torch.save({variant: three_steps(place, variant) for variant in VARIANTS}, f"{out}.{place.rank}")


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("two")
    Processes(_compare, folder / "found", ranks=2, output=folder / "printed").finish()
    return [torch.load(folder / f"found.{r}", weights_only=True) for r in range(2)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_gradients_and_queues_are_those_of_one_process_on_the_joined_batch(joined, variant: str):
    alone = three_steps(HERE, variant)
    for found in (variants[variant] for variants in joined):
        for ours, theirs in zip(found["losses"], alone["losses"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-9)
        assert found["gradients"].keys() == alone["gradients"].keys()
        for name, gradient in alone["gradients"].items():
            torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-7, atol=1e-9, msg=name)
        for name, value in alone["state"].items():
            torch.testing.assert_close(found["state"][name], value, rtol=1e-6, atol=1e-7, msg=name)
