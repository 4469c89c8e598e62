"""`correct`: the device computes what the CPU computes, in fp32 and bf16, under every setting that may change nothing.

Errors are relative: of the loss that errs most, and of all gradients as one vector, `|ours - theirs| / |theirs|`. What
a CPU finds in float64 is the measure of the recorded steps and of the objectives; the recorded losses, too, of the
former.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.step import MIDDLE, Work, prepare
from benchmarks.visit.running import Found, Setting, Stage, Task
from harmony import recipe as recipes
from harmony import recipe_files
from harmony.data.batch import Batch
from harmony.recipe import Recipe
from harmony.schedules import Clock
from harmony.training.learner import Learner
from harmony.training.process import repeatable
from harmony.training.resuming import without_init
from harmony.training.step import Stepper

TESTS = Path(__file__).parents[2] / "tests"

CPU = torch.device("cpu")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

WITHIN = {"fp32": (1e-4, 1e-3), "bf16": (0.02, 0.15)}
"""Largest relative error of a loss and of the gradient. What is wrong errs by 1 and more; bf16 has 8 bits, and on a CPU
its gradients err by 0.003 to 0.09 at these sizes, those of fp32 by less than 3e-6."""

CHOOSING = {"filip": {"fp32": (1e-4, 1e-3), "bf16": (0.02, 0.5)}}
"""Recipes whose losses take the likeliest of several tokens: where two are equal in bf16, the gradient is another's."""

SAME = (1e-5, 1e-3)
"""The same for two ways of one computation on one device in fp32."""

SETTINGS = (
    ("efficiency.backward=joint",),
    ("efficiency.checkpointing=pointwise",),
    ("efficiency.checkpointing=blocks",),
    ("efficiency.backward=joint", "efficiency.checkpointing=pointwise"),
    ("efficiency.deterministic=false",),
)
COMPILED = (
    ("efficiency.compile=true",),
    ("efficiency.compile=true", "efficiency.checkpointing=blocks"),
    ("efficiency.compile=true", "efficiency.backward=joint"),
)

TINY_RECIPES = ("swav",)


@dataclass(frozen=True)
class Outcome:
    """What a step computes.

    Attributes:
        losses: by name, unweighted.
        gradients: of the weighted sum, by parameter, in float64 on the CPU.
    """

    losses: dict[str, float]
    gradients: dict[str, Tensor]


def tasks(setting: Setting) -> Stage:
    """Recorded steps, settings, objectives, whole steps; options name recipes, in place of all."""
    _see_tests()
    torch.backends.cudnn.allow_tf32 = False  # or the patch embedding has 10 bits in fp32
    for stem in _stems(setting):
        yield Task(f"golden {stem.parent.parent.name}/{stem.name}", partial(_golden, stem, setting.device), 10)
    yield Task("steps", partial(_whole_steps, setting), 15)
    for settings in SETTINGS[-2:-1] if setting.tiny else SETTINGS:
        yield Task(f"settings {' '.join(settings)}", partial(_setting, settings, setting), 10)
    every = [name for name in recipe_files.names() if not name.endswith("-small") and name != "quickstart"]
    for name in setting.options or (TINY_RECIPES if setting.tiny else every):
        yield Task(f"objectives {name}", partial(_objectives, name, setting.device), 15)
    if not setting.tiny:  # compiling takes minutes on a small CPU
        for settings in COMPILED:
            yield Task(f"settings {' '.join(settings)}", partial(_setting, settings, setting), 90)
        yield Task("objectives at the size of ViT-S/16", partial(_real_size, setting.device), 60)


def _see_tests() -> None:
    """The recorded steps and small recipes are those of the tests."""
    for folder in (TESTS, TESTS / "training"):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


def _stems(setting: Setting) -> Iterator[Path]:
    places = [TESTS / "golden", setting.golden]
    found = [path.with_suffix("") for place in places for path in sorted(place.glob("*.npz"))]
    yield from found[:1] if setting.tiny else found


def _golden(stem: Path, device: torch.device) -> Found:
    """A recorded step on the device, in both precisions, against its record and against the CPU's gradients."""
    from golden_steps import read_golden

    step = read_golden(stem)
    recorded = {"dino": "dino_cls", "ibot": "ibot_patch", "clip": "contrastive", "mae": "generative"}
    reference = outcome(step.learner, step.batch, step.clock, CPU)
    weights = {name: step.learner.objectives[name].config.weight(step.clock) for name in reference.losses}
    names = {name: recorded.get(name, name) for name in reference.losses}
    error = max(_error(weights[n] * reference.losses[n], step.losses[names[n]]) for n in names)
    found: Found = {"cpu_to_record": error, "ok": error < 1e-9}
    for name in PRECISIONS:
        again = read_golden(stem)
        learner, batch = again.learner.float().to(device), _as(again.batch, torch.float32).to(device)
        found |= _judged(name, outcome(learner, batch, again.clock, device, PRECISIONS[name]), reference, WITHIN[name])
    return _with_verdict(found)


def _objectives(name: str, device: torch.device, recipe: Recipe | None = None) -> Found:
    """A recipe's objectives on the device, in both precisions, against the CPU."""
    recipe = recipe or _small(name)
    reference = _outcome_of(prepare(recipe, CPU), torch.float64)
    found: Found = {}
    for precision, dtype in PRECISIONS.items():
        work = prepare(recipe, CPU)
        within = CHOOSING.get(name, WITHIN)[precision]
        found |= _judged(precision, _outcome_of(work, dtype, device), reference, within)
    return _with_verdict(found)


def _setting(settings: Sequence[str], setting: Setting) -> Found:
    """Harmony's step under a setting against the same step without, both on the device."""
    found: Found = {}
    plain, changed = _small("harmony"), _small("harmony", *settings)
    for precision, dtype in PRECISIONS.items():
        reference = _outcome_of(prepare(plain, CPU), dtype, setting.device)
        other = _outcome_of(prepare(changed, CPU), dtype, setting.device)
        found |= _judged(precision, other, reference, SAME if precision == "fp32" else WITHIN["bf16"])
    return _with_verdict(found)


def _whole_steps(setting: Setting, steps: int = 3) -> Found:
    """Steps with updates: the device's losses are the CPU's, and those of a second time the same bits."""
    recipe = _small("harmony", "optim.lr=1e-3")
    with repeatable(True):
        cpu, first, second = (_losses_of_steps(recipe, device, steps) for device in (CPU, *2 * [setting.device]))
    error = max(_error(a, b) for one, other in zip(first, cpu, strict=True) for a, b in zip(one, other, strict=True))
    return {"loss_error": error, "same_bits_again": first == second, "ok": error < 1e-3 and first == second}


def _losses_of_steps(recipe: Recipe, device: torch.device, steps: int) -> list[list[float]]:
    work = prepare(recipe, CPU)  # a GPU would have drawn other weights
    stepper = Stepper(work.stepper.learner.to(device), recipe, device)
    return [
        list(stepper.step([work.batches[number].to(device)], MIDDLE).read().losses.values()) for number in range(steps)
    ]


def _real_size(device: torch.device) -> Found:
    overrides = ["model.image.name=vit_small_patch16_224", "data.batch_size=2"]
    return _objectives("harmony", device, without_init(recipes.resolve("harmony", overrides)))


def _small(name: str, *settings: str) -> Recipe:
    from shrunk import shrunk

    return without_init(shrunk(name, *settings))


def _outcome_of(work: Work, dtype: torch.dtype, device: torch.device = CPU) -> Outcome:
    learner, batch = work.stepper.learner, work.batches[0]
    if dtype == torch.float64:
        return outcome(learner.double(), _as(batch, torch.float64), MIDDLE, device)
    return outcome(learner.to(device), batch.to(device), MIDDLE, device, dtype)


def outcome(
    learner: Learner, batch: Batch, clock: Clock, device: torch.device, dtype: torch.dtype = torch.float32
) -> Outcome:
    """Losses and gradients of a learner on a batch, both on the device, as a training step has them."""
    losses: dict[str, float] = {}
    groups = learner.losses_by_group(batch, clock)
    while True:
        with torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16):
            group = next(groups, None)
        if group is None:
            break
        group.total().backward()
        losses |= {name: loss.item() for name, loss in group.losses.items()}
    gradients = {
        name: p.grad.detach().to(CPU, torch.float64) for name, p in learner.named_parameters() if p.grad is not None
    }
    return Outcome(losses, gradients)


def _as(batch: Batch, dtype: torch.dtype) -> Batch:
    return batch.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def _error(ours: float, theirs: float) -> float:
    return _share(abs(ours - theirs), abs(theirs))


def _share(part: float, whole: float) -> float:
    """A NaN is infinitely much, or no comparison would notice it."""
    share = part / max(whole, 1e-6)
    return float("inf") if math.isnan(share) else share


def _judged(prefix: str, ours: Outcome, theirs: Outcome, within: tuple[float, float]) -> Found:
    """Errors of losses and gradients, and whether they are small enough."""
    if ours.losses.keys() != theirs.losses.keys() or ours.gradients.keys() != theirs.gradients.keys():
        other = {*ours.losses, *ours.gradients} ^ {*theirs.losses, *theirs.gradients}
        return {f"{prefix}_only_one_has": sorted(other), f"{prefix}_ok": False}
    loss, name = max((_error(ours.losses[n], value), n) for n, value in theirs.losses.items())
    difference = {n: float((ours.gradients[n] - g).norm()) for n, g in theirs.gradients.items()}
    length = {n: float(g.norm()) for n, g in theirs.gradients.items()}
    gradient = _share(math.hypot(*difference.values()), math.hypot(*length.values()))
    worst = max(difference, key=lambda n: difference[n])
    return {
        f"{prefix}_loss_error": loss,
        f"{prefix}_gradient_error": gradient,
        f"{prefix}_errs_most": [name, worst],
        f"{prefix}_ok": loss <= within[0] and gradient <= within[1],
    }


def _with_verdict(found: Found) -> Found:
    return {**found, "ok": found.get("ok", True) and all(found[key] for key in found if key.endswith("_ok"))}
