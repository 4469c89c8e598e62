"""Numbers that change over a run.

Any number a recipe calls a schedule is written as a plain number or as one of

    {linear: {from: 0.04, to: 0.07, over: 5 epochs}}
    {cosine: {from: 1.0, to: 0.2, over: 10 epochs}}

A schedule moves from `from` to `to` over the given part of the run (`10 epochs`, `500 steps`, `30%`; the whole run when
left out), and stays there. It is a function of the place in the run alone, so it is valid for a run of any length: one
that is longer than the run is simply not finished when the run ends.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, PlainSerializer


@dataclass(frozen=True)
class Clock:
    """A place in a run: `step` steps of `steps` are done, and an epoch has `epoch_steps`."""

    step: int
    steps: int
    epoch_steps: int

    @property
    def epoch(self) -> float:
        """Epochs done, as a fraction (2.5 is the middle of the third)."""
        return self.step / self.epoch_steps

    @property
    def progress(self) -> float:
        """Share of the run done, from 0 to 1."""
        return min(1.0, self.step / self.steps) if self.steps else 1.0


_DURATION = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*(epochs?|steps?|%)\s*$")


class Duration(BaseModel):
    """A part of a run: `10 epochs`, `500 steps`, `30%`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    amount: float
    unit: Literal["epochs", "steps", "%"]

    @classmethod
    def parse(cls, value: Any) -> "Duration":
        if isinstance(value, Duration):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value == 0:
            return cls(amount=0, unit="steps")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 and math.isfinite(value):
            raise ValueError(f"{value:g} is not a duration; write it as '{value:g} steps' or '{value:g} epochs'")
        match = _DURATION.match(value) if isinstance(value, str) else None
        if not match:
            raise ValueError(f"{value!r} is not a duration; write it as '10 epochs', '500 steps' or '30%'")
        unit = match[2] if match[2] == "%" else match[2].rstrip("s") + "s"
        return cls(amount=float(match[1]), unit=unit)

    def steps(self, clock: Clock) -> float:
        """How many steps this is in the run that `clock` describes."""
        return self.amount * {"epochs": clock.epoch_steps, "steps": 1, "%": clock.steps / 100}[self.unit]

    def __str__(self) -> str:
        if self.unit == "%":
            return f"{self.amount:g}%"
        return f"{self.amount:g} {self.unit.removesuffix('s') if self.amount == 1 else self.unit}"


DurationField = Annotated[Duration, BeforeValidator(Duration.parse), PlainSerializer(Duration.__str__, return_type=str)]


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is not a number")
    if not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)


def _nearest(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


class Schedule(BaseModel):
    """A number as a function of the place in the run; see the module's text for how a recipe writes it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: Literal["constant", "linear", "cosine"]
    start: float
    stop: float
    over: Duration | None = None

    @classmethod
    def parse(cls, value: Any) -> "Schedule":
        if isinstance(value, Schedule):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return cls.constant(_finite(value))
        if isinstance(value, dict) and len(value) == 1:
            shape, spec = next(iter(value.items()))
            if shape in ("linear", "cosine") and isinstance(spec, dict):
                extra = set(spec) - {"from", "to", "over"}
                if extra:
                    names = sorted(map(str, extra))
                    hint = _nearest(names[0], ("from", "to", "over"))
                    raise ValueError(f"a schedule knows from, to and over, not {', '.join(names)}{hint}")
                if not {"from", "to"} <= set(spec):
                    raise ValueError("a schedule needs from and to, as in {cosine: {from: 1.0, to: 0.2}}")
                for end in ("from", "to"):
                    if isinstance(spec[end], bool) or not isinstance(spec[end], int | float):
                        raise ValueError(f"a schedule's {end} must be a number, not {spec[end]!r}")
                over = Duration.parse(spec["over"]) if spec.get("over") is not None else None
                return cls(shape=shape, start=_finite(spec["from"]), stop=_finite(spec["to"]), over=over)
            if hint := _nearest(str(shape), ("linear", "cosine") if shape not in ("linear", "cosine") else ()):
                raise ValueError(f"{value!r} is not a schedule{hint}")
        raise ValueError(
            f"{value!r} is not a schedule; write a number, {{linear: {{from: a, to: b}}}} or "
            "{cosine: {from: a, to: b, over: 10 epochs}}"
        )

    @classmethod
    def constant(cls, value: float) -> "Schedule":
        return cls(shape="constant", start=value, stop=value)

    @property
    def is_zero(self) -> bool:
        """Whether the number is zero throughout."""
        return self.start == 0 and self.stop == 0

    def __call__(self, clock: Clock) -> float:
        if self.shape == "constant":
            return self.start
        length = self.over.steps(clock) if self.over else clock.steps
        done = min(1.0, clock.step / length) if length > 0 else 1.0
        share = done if self.shape == "linear" else (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.stop - self.start) * share

    def written(self) -> Any:
        """As a recipe writes it."""
        if self.shape == "constant":
            return self.start
        spec: dict[str, Any] = {"from": self.start, "to": self.stop}
        return {self.shape: spec | ({"over": str(self.over)} if self.over else {})}


def _within(low: float, high: float) -> AfterValidator:
    allowed = f"from {low:g} to {high:g}" if math.isfinite(high) else f"at least {low:g}"

    def check(schedule: Schedule) -> Schedule:
        for value in (schedule.start, schedule.stop):
            if not low <= value <= high:
                raise ValueError(f"must be {allowed}, not {value:g}")
        return schedule

    return AfterValidator(check)


_WRITTEN = PlainSerializer(lambda schedule: schedule.written())

AnyNumber = Annotated[Schedule, BeforeValidator(Schedule.parse), _WRITTEN]
"""A schedule field without bounds; the others below are bounded at both ends."""

NonNegative = Annotated[Schedule, BeforeValidator(Schedule.parse), _within(0.0, math.inf), _WRITTEN]
Positive = Annotated[Schedule, BeforeValidator(Schedule.parse), _within(1e-12, math.inf), _WRITTEN]
Share = Annotated[Schedule, BeforeValidator(Schedule.parse), _within(0.0, 1.0), _WRITTEN]


class At:
    """The values of an object's schedules at one place in the run: `at.weight`, `at.hard_weight`, ...

    Also carries the `clock` itself and `logged`, whether this step's signs will be written to the log.
    """

    def __init__(self, settings: BaseModel, clock: Clock, logged: bool = False) -> None:
        self.clock = clock
        self.logged = logged
        for name in type(settings).model_fields:
            value = getattr(settings, name)
            if isinstance(value, Schedule):
                setattr(self, name, value(clock))

    def __getattr__(self, name: str) -> Any:  # only reached when the attribute is missing
        raise AttributeError(f"no schedule named {name!r}")
