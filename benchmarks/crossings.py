"""What crosses ranks: every collective of this process, how many bytes it hands over, and which part asks for it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

import harmony

_PACKAGE = f"{Path(harmony.__file__).parent}/"  # not by name: a checkout may be called harmony too


@dataclass(frozen=True)
class Crossing:
    """One collective.

    Attributes:
        part: "gradients"; "losses: backward" (of what the losses gathered or summed); else the module that asks.
        operation: all_reduce, all_gather, broadcast, or all_gather_object, whose bytes are not counted.
        bytes: of the tensor that this rank hands over.
    """

    part: str
    operation: str
    bytes: int

    def sent(self, ranks: int) -> float:
        """Bytes that each of `ranks` sends when the collective goes around a ring, the least that is possible."""
        shares = {"all_reduce": 2 * (ranks - 1) / ranks, "all_gather": ranks - 1, "broadcast": 1}
        return self.bytes * shares.get(self.operation, 0)


@contextmanager
def counted() -> Iterator[list[Crossing]]:
    """Note all collectives within the block, in their order."""
    found: list[Crossing] = []
    own = {name: getattr(dist, name) for name in ("all_reduce", "all_gather", "broadcast", "all_gather_object")}
    handed = {"all_reduce": 0, "broadcast": 0, "all_gather": 1}  # which argument

    def noting(name: str) -> Callable[..., Any]:
        def noted(*arguments: Any, **named: Any) -> Any:
            tensor = arguments[handed[name]] if name in handed else None
            found.append(Crossing(_part(), name, tensor.nbytes if isinstance(tensor, Tensor) else 0))
            return own[name](*arguments, **named)

        return noted

    for name in own:
        setattr(dist, name, noting(name))
    try:
        yield found
    finally:
        for name, function in own.items():
            setattr(dist, name, function)


def by_part(found: list[Crossing]) -> dict[str, dict[str, Any]]:
    """Calls and bytes of each part and operation."""
    sums: dict[str, dict[str, Any]] = {}
    for one in found:
        row = sums.setdefault(f"{one.part}: {one.operation}", {"calls": 0, "bytes": 0})
        row["calls"] += 1
        row["bytes"] += one.bytes
    return sums


def _part() -> str:
    """The innermost part of harmony that is not `ranks`; a backward function of `ranks` has none, torch calls it."""
    frame = sys._getframe(1)
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if file == _PACKAGE + "ranks.py":
            if function == "backward":
                return "losses: backward"
            if function == "average_gradients":
                return "gradients"
        elif file.startswith(_PACKAGE):
            part = file.removeprefix(_PACKAGE).removesuffix(".py")
            return "gradients" if part == "training/reduction" and function == "_send" else part
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"
