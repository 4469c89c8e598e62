"""The curves of a run, read from its log.jsonl."""

import json
import math
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path


@dataclass(frozen=True)
class Curve:
    """One logged value over the run: steps and finite values, equally many."""

    steps: list[float]
    values: list[float]

    def __bool__(self) -> bool:
        return bool(self.steps)

    @property
    def changes(self) -> bool:
        return bool(self) and max(self.values) > min(self.values)

    @property
    def last(self) -> float:
        return self.values[-1]

    @property
    def tail(self) -> float:
        """The mean of the last tenth, which says more of a noisy curve than its last point."""
        count = max(1, len(self.values) // 10)
        return sum(self.values[-count:]) / count


@dataclass(frozen=True)
class Log:
    """All logged lines of a run in the order of their steps.

    Attributes:
        lines: one flat object a logged step.
        damaged: lines that are not JSON objects with a step (a run that was killed may leave half a line).
    """

    lines: list[dict[str, float | None]] = field(default_factory=list)
    damaged: int = 0

    @classmethod
    def read(cls, path: Path) -> "Log":
        """From a file; without a file the log is empty. Of lines with the same step the last one counts."""
        if not path.exists():
            return cls()
        found: dict[float, dict[str, float | None]] = {}
        damaged = 0
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            line = _parsed(text)
            if line is None:
                damaged += bool(text.strip())
            else:
                found[float(line["step"] or 0)] = line
        return cls([found[step] for step in sorted(found)], damaged)

    def keys(self) -> list[str]:
        """Every key that some line has, in the order of first appearance."""
        return list(dict.fromkeys(key for line in self.lines for key in line))

    def under(self, prefix: str) -> dict[str, Curve]:
        """The curves whose key is `prefix`/NAME, by NAME."""
        start = f"{prefix}/"
        curves = {key.removeprefix(start): self.curve(key) for key in self.keys() if key.startswith(start)}
        return {name: curve for name, curve in curves.items() if curve}

    def curve(self, key: str) -> Curve:
        """The values of one key; empty when it was never logged."""
        steps, values = [], []
        for line in self.lines:
            value = line.get(key)
            if isinstance(value, (int, float)) and math.isfinite(value):
                steps.append(float(line["step"] or 0))
                values.append(float(value))
        return Curve(steps, values)

    def last(self, key: str) -> float | None:
        """The last value of one key."""
        curve = self.curve(key)
        return curve.last if curve else None

    def training_seconds(self) -> float | None:
        """Time spent in training steps, from the throughput of each stretch; None when it was not logged."""
        examples, rate = self.curve("examples"), self.curve("examples_per_second")
        if not rate or examples.steps != rate.steps:
            return None
        done = [0.0, *examples.values]
        pairs = zip(pairwise(done), rate.values, strict=True)
        return sum((after - before) / pace for (before, after), pace in pairs if pace > 0)


def _parsed(text: str) -> dict[str, float | None] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    if not isinstance(line, dict) or not isinstance(line.get("step"), (int, float)):
        return None
    return line


def smoothed(curve: Curve, share: float = 0.06) -> Curve:
    """A running mean over a window of `share` of the points, shorter at both ends."""
    reach = max(1, round(len(curve.values) * share / 2))
    if len(curve.values) < 8:
        return curve
    sums = [0.0]
    for value in curve.values:
        sums.append(sums[-1] + value)
    values = []
    for i in range(len(curve.values)):
        around = min(reach, i, len(curve.values) - 1 - i)
        low, high = i - around, i + around + 1
        values.append((sums[high] - sums[low]) / (high - low))
    return Curve(curve.steps, values)


def thinned(curve: Curve, most: int = 240) -> Curve:
    """At most `most` points, each the mean of its neighbours, so that a long run still makes a small page."""
    if len(curve.steps) <= most:
        return curve
    edges = [round(i * len(curve.steps) / most) for i in range(most + 1)]
    pieces = [slice(low, high) for low, high in pairwise(edges)]
    return Curve(
        [sum(curve.steps[piece]) / (piece.stop - piece.start) for piece in pieces],
        [sum(curve.values[piece]) / (piece.stop - piece.start) for piece in pieces],
    )
