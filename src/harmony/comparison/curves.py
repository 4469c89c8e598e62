"""Curves of a comparison: what was measured along the way, over the examples seen and over the compute spent."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from harmony.comparison.rows import UNTRAINED
from harmony.evaluation.report.charts import Across, Line, Mark, chart
from harmony.evaluation.report.html import Html, Section, note, tag
from harmony.evaluation.report.log import Curve

_COLOURS = (1, 2, 3, 5, 6, 7, 8, 4)
_UNITS = ((1e21, "ZFLOP"), (1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))


def sections(found: Mapping[str, Any]) -> list[Section]:
    """Two sections with a chart for each metric that was measured along the way."""
    columns = [column for column in found["columns"] if column["task"] in found["along"]]
    if not columns:
        says = "Nothing was measured along the way: none of the tasks is cheap enough."
        return [Section("examples", "Over examples seen", note(says))]
    spent = max((_last(row, "flops") for row in found["rows"]), default=0.0)
    size, unit = next(((size, unit) for size, unit in _UNITS if spent >= size), (1.0, "FLOP"))
    examples = Across(before="", after=" examples", over="the examples seen")
    compute = Across(before="", after=f" {unit}", over="the operations spent")
    return [
        Section(
            "examples",
            "Over examples seen",
            _grid(found, columns, "examples", 1.0, examples),
            "The same data for all. Pale lines are single seeds, strong ones their mean.",
        ),
        Section(
            "compute",
            "Over compute",
            _grid(found, columns, "flops", size, compute),
            "The same numbers over what they cost: operations of a pair, forward and backward, times the pairs seen. "
            "At one place of the axis, all have spent the same.",
        ),
    ]


def _grid(
    found: Mapping[str, Any], columns: Sequence[Mapping[str, Any]], over: str, unit: float, across: Across
) -> Html:
    charts = []
    untrained = found["rows"][0]["runs"]  # runs begin as this model of their seed, if not elsewhere
    begin = {seed: run["curve"] if found["begins_untrained"] else [] for seed, run in untrained.items()}
    nothing = dict.fromkeys(begin, ())
    begins = {row["name"]: nothing if row["name"] in found["begin_elsewhere"] else begin for row in found["rows"]}
    for column in columns:
        trained = [row for row in found["rows"] if row["name"] != UNTRAINED]
        lines = [
            line
            for place, row in enumerate(trained)
            if (line := _line(row, begins[row["name"]], column, over, unit, place)) is not None
        ]
        if not lines:
            continue
        level = found["rows"][0]["cells"][column["key"]].get("mean")
        marks = [] if level is None else [Mark(level, UNTRAINED)]
        charts.append(chart(column["title"], "", lines, marks, smooth=False, share=True, across=across))
    return tag("div", *charts, class_="charts wide")


def _line(
    row: Mapping[str, Any], begin: Mapping[str, Any], column: Mapping[str, Any], over: str, unit: float, place: int
) -> Line | None:
    """A row's line: the mean of its seeds wherever all of them were measured. `begin`: the point before training."""
    single = [curve for seed, run in row["runs"].items() if (curve := _curve(run, begin[seed], column, over, unit))]
    if not single:
        return None
    by_step = [dict(zip(curve.steps, curve.values, strict=True)) for curve in single]
    steps = [step for step in single[0].steps if all(step in values for values in by_step)]
    mean = Curve(steps, [math.fsum(values[step] for values in by_step) / len(by_step) for step in steps])
    pale = single if len(single) > 1 else []
    return Line(row["name"], mean, _COLOURS[place % len(_COLOURS)], tuple(pale), dashed=place >= len(_COLOURS))


def _curve(
    run: Mapping[str, Any], begin: Sequence[Mapping[str, Any]], column: Mapping[str, Any], over: str, unit: float
) -> Curve | None:
    task, name = column["task"], column["metric"]
    points = [point for point in run["curve"] if not run["failed"] and name in point["metrics"].get(task, {})]
    if not points:
        return None
    points = [point for point in begin if name in point["metrics"].get(task, {})] + points
    return Curve([point[over] / unit for point in points], [point["metrics"][task][name] for point in points])


def _last(row: Mapping[str, Any], over: str) -> float:
    return max((point[over] for run in row["runs"].values() for point in run["curve"]), default=0.0)
