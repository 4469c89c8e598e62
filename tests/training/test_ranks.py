"""Two processes do what one does on the joined batch."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Processes
from runs import HERE, log_of, tiny

from harmony.errors import UserError
from harmony.training import checkpoints, distributed
from harmony.training.distributed import Place, together
from harmony.training.run_directory import open_run
from harmony.training.trainer import Trainer, resume, train

SETTINGS = ("train.accumulate=2", "optim.lr=0.002")
VARIANTS = {
    "harmony": (),
    "others": (
        "objectives.clip={type: siglip, hard_weight: 0.3}",
        "objectives.dino.centring=sinkhorn_knopp",
        "objectives.ibot.centring=sinkhorn_knopp",
        "objectives.text_distillation.centre_on=probabilities",
        "objectives.filip={}",
        "objectives.ijepa={predictor: {width: 16, depth: 1, heads: 2}}",
        "objectives.detailclip={decoder: {heads: 2}, head: {prototypes: 24, hidden: 16, bottleneck: 8}}",
        "train.accumulate=1",
    ),
    "codes": (
        "frozen={tokenizer: {image: {name: vit_tiny_patch16_224, patch: 8, width: 16, heads: 2}, init: null}}",
        "objectives.beit={masks: {random: {ratio: 0.4}}, codes: 40, decay: 0.5, dead: 0.6}",
    ),
    "baselines": (
        "objectives.clip={label_smoothing: 0.2, crops: 2}",
        "objectives.dino={student_sees: local, mask: null}",
        "objectives.masked_distillation={head: {prototypes: 24, hidden: 16, bottleneck: 8}}",
        "objectives.text_distillation.centring=sinkhorn_knopp",
    ),
}
"""What crosses ranks in another way: the sigmoid's targets, a batch's balance, means over all tokens, words, codes."""


def three_steps(place: Place, variant: str) -> dict[str, Any]:
    """Losses, gradients and state of the first steps, in float64."""
    trainer = Trainer(tiny(*SETTINGS, *VARIANTS[variant]), place)
    trainer.learner.double()
    batches = trainer.loader.batches(0)
    found: dict[str, Any] = {"losses": [], "signs": [], "gradients": {}}
    clip = trainer.stepper.gradients.clip

    def watched(norms: torch.Tensor) -> None:
        found["gradients"] = {n: p.grad.clone() for n, p in trainer.learner.named_parameters() if p.grad is not None}
        clip(norms)

    trainer.stepper.gradients.clip = watched
    for _ in range(3):
        loaded = [next(batches) for _ in range(trainer.recipe.train.accumulate)]
        for batch in loaded:
            batch.images = {name: crops.double() for name, crops in batch.images.items()}
        found["losses"].append(trainer.stepper.step(loaded, trainer.clock, logged=True).read().losses)
    found["state"] = trainer.learner.state_dict()
    return found


def _compare(out: Path) -> None:
    with distributed.session() as place:
        assert place.ranks == 2
        torch.save({variant: three_steps(place, variant) for variant in VARIANTS}, f"{out}.{place.rank}")
        try:
            with together():
                if place.rank == 1:
                    raise UserError("the second rank's shard is missing")
        except BaseException as error:
            print(f"{type(error).__name__} {error}")


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Any], str]]:
    """What each of two ranks found, and what it printed."""
    folder = tmp_path_factory.mktemp("two")
    processes = Processes(_compare, folder / "found", ranks=2, output=folder / "printed")
    processes.finish()
    return [(torch.load(folder / f"found.{r}", weights_only=True), processes.printed(r)) for r in range(2)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_centres_and_gradients_are_those_of_one_process_on_the_joined_batch(joined, variant: str):
    alone = three_steps(HERE, variant)
    for found in (variants[variant] for variants, _ in joined):
        for ours, theirs in zip(found["losses"], alone["losses"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-9)
        assert found["gradients"].keys() == alone["gradients"].keys()
        for name, gradient in alone["gradients"].items():
            torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-7, atol=1e-9, msg=name)
        assert {"objectives.dino.centre.mean", "objectives.ibot.centre.mean"} <= found["state"].keys()
        for name, value in alone["state"].items():
            torch.testing.assert_close(found["state"][name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_what_fails_on_one_rank_fails_on_all_and_the_first_tells(joined):
    assert "UserError the second rank's shard is missing" in joined[0][1]
    assert "StoppedElsewhere" in joined[1][1]
    assert "UserError" not in joined[1][1]


SIGNALLED = """
import os, sys
from harmony import ranks
from harmony.training.step import Stepper
from harmony.training.trainer import train
from runs import tiny

step = Stepper.step

def signalled(self, loaded, clock, logged):
    if clock.step == 4 and ranks.rank() == 1:
        os.kill(os.getpid(), 15)
    return step(self, loaded, clock, logged)

Stepper.step = signalled
train(tiny("optim.lr=0.001"), sys.argv[1])
"""


def _torchrun(code: str, folder: Path, *arguments: object) -> tuple[int, str]:
    """Exit status and output of a script on two processes."""
    (folder / "script.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(folder / "script.py"), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def test_a_signal_to_one_rank_stops_all_after_saving_and_one_process_goes_on(tmp_path: Path):
    status, printed = _torchrun(SIGNALLED, tmp_path, tmp_path / "two")
    assert status != 0
    assert printed.count("Stopped and saved at step 5") == 1, printed
    run = open_run(tmp_path / "two")
    state = checkpoints.read_state(run.latest())
    assert (state.step, state.ranks) == (5, 2)
    train(tiny("optim.lr=0.001"), tmp_path / "one")
    resume(tmp_path / "two")
    lines = log_of(tmp_path / "two")
    assert [line["step"] for line in lines] == list(range(1, 9))
    for ours, theirs in zip(lines, log_of(tmp_path / "one"), strict=True):
        assert ours.keys() == theirs.keys()
        exact = [key for key in theirs if not key.startswith("sign/")]
        exact += [key for key in theirs if key.startswith(("sign/dino/", "sign/student_image/"))]
        # The other signs are means over ranks of means over what each rank masked.
        assert [ours[key] for key in exact] == pytest.approx([theirs[key] for key in exact], rel=2e-3)


def test_one_process_has_no_group():
    with distributed.session() as place:
        assert (place.rank, place.ranks) == (0, 1)
        assert not torch.distributed.is_initialized()
