"""How long each part of a step takes, without a change to the step: marks are set where it passes from one to the next.

On a GPU a mark is an event in its stream, so nothing waits for it.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from harmony.data.batch import Batch
from harmony.schedules import Clock
from harmony.training.learner import GroupLosses
from harmony.training.step import Stepper


class Stopwatch:
    """Watches a stepper. Call `start` before a step and `stop` after it."""

    def __init__(self, stepper: Stepper, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []
        learner = stepper.learner
        self._by_group = learner.losses_by_group
        learner.losses_by_group = self._watched
        self._after(learner, "given", "teacher")
        self._after(stepper.gradients, "norms", "update: norms")
        self._after(stepper.gradients, "clip", "update: clip")
        self._after(stepper.optimiser, "step", "update: optimiser")
        self._after(learner, "after_update", "update: teacher")

    def start(self) -> None:
        self._marks = []
        self._mark("")

    def stop(self) -> dict[str, float]:
        """Seconds by part, in the order of the step; they add up to the whole."""
        self._mark("rest")
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds: dict[str, float] = {}
        for (_, before), (name, after) in zip(self._marks, self._marks[1:], strict=False):
            passed = before.elapsed_time(after) / 1e3 if self._device.type == "cuda" else after - before
            seconds[name] = seconds.get(name, 0.0) + passed
        return seconds

    def _mark(self, name: str) -> None:
        """What ran since the last mark was `name`."""
        now: Any = time.perf_counter()
        if self._device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record(torch.cuda.current_stream(self._device))
        self._marks.append((name, now))

    def _watched(self, batch: Batch, clock: Clock, logged: bool = False) -> Iterator[GroupLosses]:
        self._mark("batch")
        groups = self._by_group(batch, clock, logged)
        while (group := next(groups, None)) is not None:
            name = "+".join(group.objectives)
            self._mark(f"{name}: forward")
            yield group
            self._mark(f"{name}: backward")

    def _after(self, owner: Any, method: str, name: str) -> None:
        """Set a mark whenever a method of an object has run."""
        run: Callable[..., Any] = getattr(owner, method)

        def marked(*arguments: Any, **named: Any) -> Any:
            result = run(*arguments, **named)
            self._mark(name)
            return result

        setattr(owner, method, marked)
