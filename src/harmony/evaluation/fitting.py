"""How tasks train weights of their own: fine-tuning, segmentation, detection, and the probe with augmentation.

AdamW or another optimiser, one learning rate schedule with a factor for each parameter group (layer-wise decay),
batches that are a function of the step, one averaging of gradients over ranks, and a checkpoint from which an
interrupted task goes on.
"""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from harmony import ranks
from harmony.data.workers import count_workers, start_worker
from harmony.disk import room_explained
from harmony.errors import UserError
from harmony.evaluation.progress import say, steps_bar
from harmony.evaluation.seeds import seeded
from harmony.evaluation.settings.base import FitConfig
from harmony.schedules import Clock, Schedule
from harmony.training.distributed import TrainingError, together
from harmony.training.signals import Interrupted, Signals

BatchT = TypeVar("BatchT")

SAVED_EVERY = 200
"""Steps between two checkpoints; one is also written when a signal stops the task."""


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


class Batches(Dataset[BatchT], Generic[BatchT]):
    """The batches of a training, each a function of its step alone.

    A subclass says how many examples there are and makes one rank's share of a batch; order, ranks and chance are here.

    Args:
        examples: how many training examples there are.
        config: batch size, length, seed.
    """

    def __init__(self, examples: int, config: FitConfig) -> None:
        self.examples = examples
        self.config = config
        self.batch_size = min(config.train_batch_size, examples)
        if self.batch_size % ranks.count():
            raise UserError(
                f"a batch of {self.batch_size} cannot be divided among {ranks.count()} processes; "
                "set train_batch_size to a multiple of their number"
            )
        self.epoch_steps = max(1, examples // self.batch_size)
        self.steps = config.steps or max(1, round(config.epochs * self.epoch_steps))
        self._rank, self._ranks = ranks.rank(), ranks.count()

    def make(self, positions: Sequence[int]) -> BatchT:
        """The examples at `positions` of 0 .. examples - 1, augmented; draws from the global generators."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> BatchT:
        """This rank's share of the batch of a step counted from 0."""
        epoch, place = divmod(step, self.epoch_steps)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        order = torch.randperm(self.examples, generator=generator)
        batch = order[place * self.batch_size : (place + 1) * self.batch_size]
        share = len(batch) // self._ranks
        with seeded("batch", self.config.seed, step, self._rank):
            return self.make(batch[self._rank * share : (self._rank + 1) * share].tolist())


def fit(
    model: nn.Module,
    loss: Callable[[BatchT], Tensor],
    batches: Batches[BatchT],
    groups: Sequence[Group],
    doing: str,
    *,
    device: torch.device,
    workers: int | str = "auto",
    work: Path | None = None,
    about: Mapping[str, Any] | None = None,
    after_step: Callable[[int], None] = lambda step: None,
    make_optimiser: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
) -> None:
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
        about: what must be equal for a checkpoint to be gone on with: settings, data, weights' fingerprint.
        after_step: called with the number of steps done, as for a moving average of the weights.
        make_optimiser: its class, or what makes it of parameter groups and lr.

    Raises:
        TrainingError: the loss is not finite.
        Interrupted: a signal stopped it, after saving.
    """
    config = batches.config
    trained = [parameter for group in groups for parameter in group.parameters if parameter.requires_grad]
    optimiser = make_optimiser(_settings(groups, config), lr=config.lr)
    ranks.broadcast(list(model.state_dict().values()))
    path = None if work is None else work / "fit.pt"
    agreed = dict(about or {}) | {"settings": config.model_dump(mode="json"), "ranks": ranks.count()}
    start = _restored(path, agreed, model, optimiser)
    clock = Clock(start, batches.steps, batches.epoch_steps)
    model.train()
    with Signals() as signals, steps_bar(batches.steps, start, doing) as bar:
        for step, batch in enumerate(_loader(batches, start, workers, device), start):
            clock = Clock(step, batches.steps, batches.epoch_steps)
            _set_rates(optimiser, groups, config, clock)
            with seeded("step", config.seed, step, ranks.rank()):
                with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    value = loss(batch)
                value.backward()
            ranks.average_gradients(trained)
            norm = torch.nn.utils.clip_grad_norm_(trained, config.clip_norm or float("inf"))
            shown = float(ranks.mean(value))
            if not (torch.isfinite(norm) and torch.isfinite(torch.tensor(shown))):
                raise TrainingError(f"{doing}: the loss is not finite at step {step + 1}; lower lr (--set lr=...)")
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            after_step(step + 1)
            bar(step + 1, f"loss {shown:.3f}")
            stopped_by = signals.anywhere()
            if path is not None and (stopped_by is not None or (step + 1) % SAVED_EVERY == 0):
                _save(path, step + 1, agreed, model, optimiser)
            if stopped_by is not None:
                if path is not None and ranks.is_main():
                    say(f"Stopped and saved at step {step + 1} of {batches.steps}; the same command goes on from there")
                raise Interrupted(stopped_by)
    model.eval()


def forget(work: Path | None) -> None:
    """Remove the checkpoint of a training whose results are written."""
    if work is not None and ranks.is_main():
        (work / "fit.pt").unlink(missing_ok=True)


def _settings(groups: Sequence[Group], config: FitConfig) -> list[dict[str, Any]]:
    return [
        {"params": list(group.parameters), "weight_decay": config.weight_decay if group.decays else 0.0}
        for group in groups
    ]


def _set_rates(optimiser: torch.optim.Optimizer, groups: Sequence[Group], config: FitConfig, clock: Clock) -> None:
    warmup = config.warmup.steps(clock)
    if clock.step + 1 < warmup:
        rate = config.lr * (clock.step + 1) / warmup
    else:
        fall = Schedule(shape="cosine", start=config.lr, stop=config.final_lr)
        rate = fall(Clock(int(clock.step - warmup + 1), max(1, int(clock.steps - warmup + 1)), 1))
    for settings, group in zip(optimiser.param_groups, groups, strict=True):
        settings["lr"] = rate * group.lr_scale


def _loader(batches: Batches[BatchT], start: int, workers: int | str, device: torch.device) -> "DataLoader[BatchT]":
    count = count_workers(workers, 2**24) if workers == "auto" or isinstance(workers, int) else 0  # type: ignore[arg-type]
    return DataLoader(
        batches,
        batch_size=None,  # a dataset item is a whole batch
        sampler=range(start, batches.steps),
        num_workers=min(count, max(0, batches.steps - start - 1)),
        worker_init_fn=start_worker,
        pin_memory=device.type == "cuda",
    )


def _restored(path: Path | None, agreed: dict[str, Any], model: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Steps done by the checkpoint at `path`, whose state is loaded; 0 when there is none that fits."""
    if path is None or not path.is_file():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        agrees = state["about"] == agreed
    except Exception:  # damaged: an older file, or of another program
        agrees = False
    if not agrees:
        say(f"{path} belongs to other settings, data or weights; the training begins anew")
        return 0
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    say(f"Going on from step {state['step']}")
    return int(state["step"])


def _save(path: Path, step: int, agreed: dict[str, Any], model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    with together():
        if not ranks.is_main():
            return
        state = {"step": step, "about": agreed, "model": model.state_dict(), "optimiser": optimiser.state_dict()}
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        with room_explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.save(state, aside)
                aside.replace(path)
            finally:
                aside.unlink(missing_ok=True)


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
        for name, tensor in slow.items():
            if tensor.is_floating_point():
                tensor.lerp_(fast[name], 1 - self._momentum)
            else:
                tensor.copy_(fast[name])
