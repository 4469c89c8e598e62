"""Several ways of doing the same work, timed in turn: A B A B ..., so that a busy machine is busy for all of them."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import Growth, finish
from harmony.training.process import GarbageByHand


@dataclass(frozen=True)
class Way:
    """One way of making a step.

    Attributes:
        name: what tables call it.
        step: makes the step of a number, and leaves no gradients behind, or these would count as nobody's memory.
        kept: the tensors that live between steps: weights, slow copies, the optimiser's.
    """

    name: str
    step: Callable[[int], object]
    kept: Callable[[], Iterable[Tensor]]


def in_turn(ways: Sequence[Way], device: torch.device, rounds: int, warmup: int) -> dict[str, dict[str, Any]]:
    """Time every way `rounds` times after `warmup` rounds that do not count, then look at the memory of one step each.

    Returns:
        By name: `steps_s` and their median `step_s`, `processor_s` (median seconds of the processor over all threads),
        `kept_gib`, and `step_gib`, what a step takes on top of it at its fullest moment.
    """
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    processor: dict[str, list[float]] = {way.name: [] for way in ways}
    with GarbageByHand():
        for number in range(warmup + rounds):
            for way in ways:
                finish(device)
                begun, used = time.perf_counter(), time.process_time()
                way.step(number)
                finish(device)
                if number >= warmup:
                    seconds[way.name].append(time.perf_counter() - begun)
                    processor[way.name].append(time.process_time() - used)
    return {
        way.name: {
            "step_s": statistics.median(seconds[way.name]),
            "steps_s": seconds[way.name],
            "processor_s": statistics.median(processor[way.name]),
            "kept_gib": _gib(way.kept()),
            "step_gib": _growth(way, device),
        }
        for way in ways
    }


def _growth(way: Way, device: torch.device) -> float | None:
    with Growth(device) as growth:
        way.step(0)
    return growth.gib


def _gib(tensors: Iterable[Tensor]) -> float:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values()) / 2**30


def kept_by(modules: Iterable[torch.nn.Module], optimiser: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters and buffers of modules, and an optimiser's running means."""
    found = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    states = (value for state in optimiser.state.values() for value in state.values())
    return found + [value for value in states if isinstance(value, Tensor)]
