"""Line charts, bars and a matrix as inline SVG; colours are the page's CSS variables, so that they follow its dress."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from harmony.evaluation.report.html import Html, joined, number, percent, tag
from harmony.evaluation.report.log import Curve, smoothed, thinned

WIDTH, HEIGHT = 264, 168
LEFT, RIGHT, TOP, BOTTOM = 36, 6, 8, 24
"""The picture and its margins, in px of a chart shown at its natural size."""

LETTER = 5.6
"""Width of a letter of a label, about."""


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: what the legend calls it.
        curve: its points.
        colour: which of the page's eight colours it has (1 to 8).
        single: pale lines of the same colour, of which this one is the mean.
        dashed: tells it from another line of its colour.
    """

    name: str
    curve: Curve
    colour: int = 1
    single: tuple[Curve, ...] = ()
    dashed: bool = False


@dataclass(frozen=True)
class Across:
    """What runs from left to right: words before and after its numbers, and what a chart is drawn over."""

    before: str = "step "
    after: str = ""
    over: str = "the steps of the run"


STEPS = Across()


@dataclass(frozen=True)
class Mark:
    """A horizontal line to compare with, and what it means."""

    value: float
    label: str


def chart(
    title: str,
    says: str,
    lines: Sequence[Line],
    marks: Sequence[Mark] = (),
    smooth: bool = True,
    share: bool = False,
    across: Across = STEPS,
) -> Html:
    """A figure with one chart: title, value at the end, the lines over the steps, and a sentence on it.

    Args:
        title: what is drawn.
        says: one sentence that helps to read it.
        lines: at least one, each with points.
        marks: horizontal lines to compare with.
        smooth: whether a running mean is drawn over the (then pale) points.
        share: whether the values are shares, shown as percentages.
        across: what the curves run over, where that is not steps.
    """
    drawn = [(line, thinned(line.curve), thinned(smoothed(line.curve)) if smooth else None) for line in lines]
    single = [(line, thinned(curve)) for line in lines for curve in line.single]
    values = [value for _, raw, mean in drawn for value in (*raw.values, *(mean.values if mean else ()))]
    values += [value for _, curve in single for value in curve.values]
    scale = Scale.around(values, [mark.value for mark in marks], share)
    first, last = min(line.curve.steps[0] for line in lines), max(line.curve.steps[-1] for line in lines)
    plot, curves = Plot(scale, first, last), [curve for _, raw, mean in drawn for curve in (raw, mean) if curve]
    body = joined(
        [
            *plot.grid(share, across),
            *(plot.path(curve, line.colour, "raw") for line, curve in single),
            *(plot.path(raw, line.colour, "raw" if mean else _stroke(line)) for line, raw, mean in drawn),
            *(plot.path(mean, line.colour, _stroke(line)) for line, _, mean in drawn if mean),
            *(plot.mark(mark, curves) for mark in marks if scale.low <= mark.value <= scale.high),
        ]
    )
    image = tag(
        "svg",
        body,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{title} over {across.over}",
        data_chart=_hover(plot, [(line, mean or raw) for line, raw, mean in drawn], share, across),
    )
    beside, legend = Html(""), Html("")
    if len(lines) == 1:
        tail = lines[0].curve.tail
        beside = tag("span", percent(tail) if share else number(tail), class_="now")
    else:
        keys = (
            tag("span", tag("i", class_=f"c{line.colour}{' dashed' * line.dashed}"), line.name, class_="key")
            for line in lines
        )
        legend = tag("div", *keys, class_="legend")
    head = tag("div", tag("h3", title), beside, class_="head")
    return tag("figure", head, image, legend, tag("figcaption", says) if says else "", class_="chart")


def _stroke(line: Line) -> str:
    return "line dashed" if line.dashed else "line"


def _hover(plot: "Plot", lines: Sequence[tuple[Line, Curve]], share: bool, across: Across) -> str:
    """What the page's script needs to read values off the chart."""
    return json.dumps(
        {
            "share": share,
            "before": across.before,
            "after": across.after,
            "top": TOP,
            "bottom": HEIGHT - BOTTOM,
            "lines": [
                {
                    "name": line.name,
                    "colour": line.colour,
                    "points": [
                        [round(step, 3), float(f"{value:.5g}"), round(plot.x(step), 1), round(plot.y(value), 1)]
                        for step, value in zip(curve.steps, curve.values, strict=True)
                    ],
                }
                for line, curve in lines
            ],
        },
        separators=(",", ":"),
    )


@dataclass(frozen=True)
class Scale:
    """A vertical axis from `low` to `high` with a tick each `step`."""

    low: float
    high: float
    step: float

    @classmethod
    def around(cls, values: Sequence[float], marks: Sequence[float] = (), share: bool = False) -> "Scale":
        """An axis that holds the values, and a mark when that costs less than half of the height.

        Where the values are shares, it does not leave 0 to 1 for those that are all equal.
        """
        low, high = min(values), max(values)
        span = high - low
        for mark in marks:
            if low - span <= mark <= high + span:
                low, high = min(low, mark), max(high, mark)
        if high - low < 1e-9 * max(1.0, abs(high)):
            within = share and 0 <= low <= high <= 1
            low, high = low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1)
            if within:
                low, high = max(low, 0.0), min(high, 1.0)
        step = nice_step((high - low) / 3.2)
        return cls(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, step)

    def ticks(self) -> list[float]:
        return [self.low + i * self.step for i in range(round((self.high - self.low) / self.step) + 1)]


def nice_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is at least `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))


@dataclass(frozen=True)
class Plot:
    """Where values and steps lie in the picture."""

    scale: Scale
    first: float
    last: float

    def x(self, step: float) -> float:
        span = self.last - self.first
        return LEFT + (WIDTH - LEFT - RIGHT) * ((step - self.first) / span if span else 0.5)

    def y(self, value: float) -> float:
        share = (value - self.scale.low) / (self.scale.high - self.scale.low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    def grid(self, share: bool, across: Across) -> list[Html]:
        parts = []
        for tick in self.scale.ticks():
            y = f"{self.y(tick):.1f}"
            parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
            parts.append(tag("text", _tick(tick, self.scale, share), x=LEFT - 6, y=y, dy="0.32em", class_="left"))
        for step, place in ((self.first, "start"), (self.last, "end")):
            label = f"{across.before}{number(step)}" if place == "start" else f"{number(step)}{across.after}"
            parts.append(tag("text", label, x=f"{self.x(step):.1f}", y=HEIGHT - 7, class_=place))
        return parts

    def mark(self, mark: Mark, curves: Sequence[Curve]) -> Html:
        """A dashed line and its label, which stands where no curve runs, if there is such a place."""
        y = self.y(mark.value)
        line = tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="mark")
        points = [(self.x(s), self.y(v)) for curve in curves for s, v in zip(curve.steps, curve.values, strict=True)]
        width = LETTER * len(mark.label)
        places = [
            (x, baseline, side)
            for baseline in (y - 5, y + 12)
            for x, side in ((WIDTH - RIGHT - width, "end"), (LEFT + 4.0, "start"))
            if TOP + 8 < baseline < HEIGHT - BOTTOM
        ]
        x, baseline, side = min(places, key=lambda place: _covered(place[0], place[1], width, points))
        edge = x + width if side == "end" else x
        return joined([line, tag("text", mark.label, x=f"{edge:.1f}", y=f"{baseline:.1f}", class_=f"{side} marked")])

    def path(self, curve: Curve, colour: int, kind: str) -> Html:
        points = [f"{self.x(s):.1f} {self.y(v):.1f}" for s, v in zip(curve.steps, curve.values, strict=True)]
        if len(points) == 1:
            x, y = points[0].split()
            return tag("circle", cx=x, cy=y, r=3, class_=f"dot c{colour}")
        return tag("path", d="M" + "L".join(points), class_=f"{kind} c{colour}")


def _covered(left: float, baseline: float, width: float, points: Sequence[tuple[float, float]]) -> int:
    """How many points lie behind a label."""
    return sum(left - 6 < x < left + width + 6 and baseline - 12 < y < baseline + 5 for x, y in points)


def _tick(value: float, scale: Scale, share: bool) -> str:
    """A tick's label, with just the digits that tell it from its neighbours."""
    unit, behind = (0.01, " %") if share else (1.0, "")
    top = max(abs(scale.low), abs(scale.high))
    if not share and not 5e-3 <= top < 1e5:
        power = math.floor(math.log10(top))
        unit, behind = 10.0**power, f"e{power}"
    if abs(value) < 1e-6 * scale.step:
        return f"0{behind}" if share else "0"
    step = scale.step / unit
    exact = (digits for digits in range(7) if abs(step * 10**digits - round(step * 10**digits)) < 1e-6)
    digits = next(exact, 3)  # a step that no few digits tell exactly
    return f"{value / unit:,.{digits}f}{behind}"


class Bar(NamedTuple):
    """One bar: its label, a share from 0 to 1 (None when there is none), a remark, and a colour of its own (as CSS)."""

    label: str
    share: float | None
    remark: str = ""
    colour: str | None = None


def bars(rows: Sequence[Bar], chance: float | None = None) -> Html:
    """Horizontal bars of shares, with a level that is marked in every bar."""
    mark = "" if chance is None else tag("b", style=f"left:{100 * chance:.2f}%", title=f"chance {percent(chance)}")
    drawn = []
    for label, share, remark, colour in rows:
        paint = f";background:{colour}" if colour else ""
        fill = tag("i", style=f"width:{100 * share:.2f}%{paint}") if share is not None else ""
        drawn.append(
            tag(
                "div",
                tag("span", label, class_="label", title=label),
                tag("span", fill, mark, class_="track"),
                tag("span", "none" if share is None else percent(share), tag("small", remark), class_="value"),
                class_="bar",
            )
        )
    return tag("div", *drawn, class_="bars")


def heat_map(counts: Sequence[Sequence[int]], names: Sequence[str]) -> Html:
    """A confusion matrix: a row a true class, a column a predicted one, shaded by the row's share."""
    size = len(names)
    cells = []
    for row, line in enumerate(counts):
        total = sum(line) or 1
        for column, count in enumerate(line):
            if count:
                cells.append(
                    tag(
                        "rect",
                        tag("title", f"{names[row]} → {names[column]}: {count} of {total} ({percent(count / total)})"),
                        x=column,
                        y=row,
                        width=0.94,
                        height=0.94,
                        class_="right" if row == column else "wrong",
                        fill_opacity=f"{0.12 + 0.88 * count / total:.2f}",
                    )
                )
    return tag("svg", *cells, viewBox=f"0 0 {size} {size}", class_="heat", role="img", aria_label="confusion matrix")
