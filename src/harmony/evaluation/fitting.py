"""How tasks train weights of their own: fine-tuning, segmentation, detection, and the probe with augmentation.

AdamW or another optimiser, one learning rate schedule with a factor for each parameter group (layer-wise decay),
batches that are a function of the step, one averaging of gradients over ranks, and a checkpoint from which an
interrupted task goes on.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harmony import ranks
from harmony.evaluation.batches import Batches, BatchT
from harmony.evaluation.fit_checkpoint import FitCheckpoint, forget
from harmony.evaluation.progress import say, steps_bar
from harmony.evaluation.seeds import seeded
from harmony.evaluation.settings.base import FitConfig
from harmony.schedules import Clock, Schedule
from harmony.training.distributed import TrainingError
from harmony.training.process import repeatable
from harmony.training.signals import Interrupted, Signals

__all__ = ["Average", "Batches", "Curve", "Group", "fit", "forget", "learning_rate"]

SAVED_EVERY = 200
"""Steps between two checkpoints; one is also written at the end, and when a signal stops the task."""

LOOKED_EVERY = 20
"""Steps between two looks at the losses on a GPU, which waits for each look; on a CPU every step is looked at."""

CURVE_POINTS = 200
"""Most points that a training curve has."""

Curve = list[tuple[int, float]]
"""(steps done, mean loss since the point before)."""


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate.

    Attributes:
        parameters: which ones.
        lr_scale: factor of the schedule's learning rate.
        decays: whether weight decay applies.
    """

    parameters: Sequence[nn.Parameter]
    lr_scale: float = 1.0
    decays: bool = True


def adamw(settings: Sequence[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """AdamW, fused where torch can."""
    devices = {parameter.device.type for group in settings for parameter in group["params"]}
    return torch.optim.AdamW(settings, lr=lr, fused=devices <= {"cpu", "cuda"})


def fit(
    model: nn.Module,
    loss: Callable[[BatchT], Tensor],
    batches: Batches[BatchT],
    groups: Sequence[Group],
    doing: str,
    *,
    device: torch.device,
    workers: int | Literal["auto"] = "auto",
    work: Path | None = None,
    about: Mapping[str, Any] | None = None,
    after_step: Callable[[int], object] = lambda step: None,
    also: Mapping[str, nn.Module] = MappingProxyType({}),
    make_optimiser: Callable[..., torch.optim.Optimizer] = adamw,
    deterministic: bool = False,
) -> Curve:
    """Train `model` in place.

    Args:
        model: what is trained; its whole state is in the checkpoint.
        loss: the scalar loss of a batch as `batches` made it (the callee moves it to the device); a mean over this
            rank's examples.
        batches: the batches, with the settings of the training.
        groups: all parameters that are trained.
        doing: what the progress line says, as "fine-tuning on 3,000 images".
        device: where the model is.
        workers: processes that make batches.
        work: folder for the checkpoint, which `forget` removes once results are written; None keeps none.
        about: what must be equal for a checkpoint to be gone on with: data, weights' fingerprint, ...; settings and
            number of ranks are added.
        after_step: called with the number of steps done, as for a moving average of the weights.
        also: other modules whose state belongs to the training, as that average, by name.
        make_optimiser: what makes the optimiser of parameter groups and lr.
        deterministic: choose kernels that give the same bits every time, on a GPU as well.

    Returns:
        The losses, in at most 200 points.

    Raises:
        TrainingError: loss or gradient is not finite.
        UserError: the disk has no room for the checkpoint.
        Interrupted: a signal stopped it, after saving.
    """
    config = batches.config
    trained = [parameter for group in groups for parameter in group.parameters if parameter.requires_grad]
    optimiser = make_optimiser(_settings(groups, config), lr=config.lr)
    modules = {"model": model, **also}
    ranks.broadcast([tensor for module in modules.values() for tensor in module.state_dict().values()])
    agreed = dict(about or {}) | _told(config) | {"steps": batches.steps, "ranks": ranks.count()}
    checkpoint = FitCheckpoint(work, agreed, modules, optimiser)
    start, besides = checkpoint.restore()
    losses = _Losses(doing, batches.steps, besides)
    if start == batches.steps:
        model.eval()
        return losses.curve
    checkpoint.check_room()
    look_every = LOOKED_EVERY if device.type == "cuda" else 1
    model.train()
    with repeatable(deterministic), Signals() as signals, steps_bar(batches.steps, start, doing) as bar:
        for step, batch in enumerate(batches.from_step(start, workers, device), start):
            _set_rates(optimiser, groups, learning_rate(config, Clock(step, batches.steps, batches.epoch_steps)))
            with seeded("step", config.seed, step, ranks.rank()):
                with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    value = loss(batch)
                value.backward()
            ranks.average_gradients(trained)
            losses.add(step + 1, value, _clipped(trained, config.clip_norm))
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            after_step(step + 1)
            stopped_by = signals.anywhere()
            done = step + 1 == batches.steps
            save = stopped_by is not None or done or (step + 1) % SAVED_EVERY == 0
            if save or (step + 1) % look_every == 0:
                losses.look()
            bar(step + 1, f"loss {losses.last:.3f}")
            if save:
                checkpoint.save(step + 1, losses.state())
            if stopped_by is not None:
                _say_stopped(step + 1, batches.steps, checkpoint.path)
                raise Interrupted(stopped_by)
    model.eval()
    return losses.curve


def learning_rate(config: FitConfig, clock: Clock) -> float:
    """The learning rate, before a group's factor, of the step that starts at `clock`.

    Grows in equal parts over the warm-up, to `lr` in its last step, then falls along half a cosine to `final_lr`, which
    the step after the last would have: the last step still learns.
    """
    warmup = config.warmup.steps(clock)
    place = clock.step + 1
    if place < warmup:
        return config.lr * place / warmup
    rise = max(1, math.ceil(warmup))
    fall = Schedule(shape="cosine", start=config.lr, stop=config.final_lr)
    return fall(Clock(step=place - rise, steps=max(1, clock.steps + 1 - rise), epoch_steps=1))


def _told(config: FitConfig) -> dict[str, Any]:
    """The settings one by one, so that a checkpoint of others can be told by their names."""
    return config.model_dump(mode="json")


def _settings(groups: Sequence[Group], config: FitConfig) -> list[dict[str, Any]]:
    return [
        {"params": list(group.parameters), "weight_decay": config.weight_decay if group.decays else 0.0}
        for group in groups
    ]


def _set_rates(optimiser: torch.optim.Optimizer, groups: Sequence[Group], rate: float) -> None:
    for settings, group in zip(optimiser.param_groups, groups, strict=True):
        settings["lr"] = rate * group.lr_scale


def _clipped(parameters: Sequence[nn.Parameter], most: float | None) -> Tensor:
    """The norm of the whole gradient, which is shortened to `most` where it is longer."""
    if most is not None:
        return torch.nn.utils.clip_grad_norm_(parameters, most)
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def _say_stopped(step: int, steps: int, path: Path | None) -> None:
    if not ranks.is_main():
        return
    if path is None:
        say(f"Stopped at step {step:,} of {steps:,}; nothing is kept without an output folder")
    else:
        say(f"Stopped and saved at step {step:,} of {steps:,}; the same command goes on from there")


class _Losses:
    """The losses of a training. They stay on the device until they are looked at.

    Args:
        doing: what errors call the training.
        steps: of the whole training.
        state: what `state` gave, of a training that goes on.

    Attributes:
        curve: a point for every so many steps.
        last: the loss that was last looked at.
    """

    def __init__(self, doing: str, steps: int, state: Any = None) -> None:
        self._doing, self._steps = doing, steps
        self._every = math.ceil(steps / CURVE_POINTS)
        self._unseen: list[tuple[int, Tensor]] = []
        self.curve: Curve = [] if state is None else [(int(step), float(loss)) for step, loss in state["curve"]]
        self._since: list[float] = [] if state is None else list(state["since"])
        self.last = math.nan

    def add(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Note a step's loss on this rank and the norm of its gradient; `step` is the number of steps done."""
        self._unseen.append((step, torch.stack([loss.detach().float(), norm.detach().float()])))

    def look(self) -> None:
        """Take over what was added; TrainingError when something in it is not finite."""
        numbers = ranks.mean(torch.stack([pair for _, pair in self._unseen])).tolist()
        for (step, _), (loss, norm) in zip(self._unseen, numbers, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what = "gradient" if math.isfinite(loss) else "loss"
                raise TrainingError(f"{self._doing}: the {what} is not finite at step {step}; lower lr (--set lr=...)")
            self._since.append(loss)
            if step % self._every == 0 or step == self._steps:
                self.curve.append((step, math.fsum(self._since) / len(self._since)))
                self._since = []
            self.last = loss
        self._unseen = []

    def state(self) -> dict[str, Any]:
        return {"curve": [list(point) for point in self.curve], "since": list(self._since)}


class Average:
    """A moving average of a model's weights.

    Attributes:
        model: the averaged copy, in evaluation mode.
    """

    def __init__(self, model: nn.Module, momentum: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._of, self._momentum = model, momentum

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After a step: average <- momentum * average + (1 - momentum) * weights."""
        slow, fast = self.model.state_dict(), self._of.state_dict()
        moving = [name for name, tensor in slow.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([slow[name] for name in moving], [fast[name] for name in moving], 1 - self._momentum)
        for name in slow.keys() - set(moving):
            slow[name].copy_(fast[name])
