"""What tasks that choose or train something show of it: the vote by k, the grid of a probe, the loss of training."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from harmony.evaluation.report.charts import Bar, Line, bars, chart
from harmony.evaluation.report.html import Html, number, percent, tag
from harmony.evaluation.report.log import Curve
from harmony.evaluation.report.words import chance_of

_AXES = ("regularisation", "lr")
_POOLING = {"cls": "class token", "cls+patches": "class token and mean patch", "cls_patches": "class token, mean patch"}


def votes(metrics: Mapping[str, float]) -> list[Html]:
    """Accuracy of the vote of k neighbours, for every k."""
    found = {int(match[1]): name for name in metrics if (match := re.fullmatch(r"top1@(\d+)", name))}
    if len(found) < 2:
        return []
    rows = [Bar(f"{k:,} neighbours", metrics[name]) for k, name in sorted(found.items())]
    drawn = bars(rows, chance_of(found[min(found)], metrics))
    return [tag("h3", "How many vote"), tag("div", drawn, class_="narrow")]


def grid(details: Mapping[str, Any]) -> list[Html]:
    """Every setting that was tried, by its accuracy on the part of the training data kept for choosing."""
    tried = [dict(one) for one in details.get("grid") or []]
    if not tried:
        return []
    axis = next((name for name in _AXES if name in tried[0]), None)
    rows = list(dict.fromkeys(_row_name(one, axis) for one in tried))
    columns = sorted({one[axis] for one in tried}) if axis else [None]
    cells = {(_row_name(one, axis), one[axis] if axis else None): one for one in tried}
    best = max((one["validation_top1"] or 0 for one in tried), default=0) or 1
    head = tag("tr", tag("th", axis or "setting"), *(tag("th", "" if c is None else number(c)) for c in columns))
    body = [tag("tr", tag("td", row), *(_cell(cells.get((row, c)), best) for c in columns)) for row in rows]
    says = (
        "Accuracy on a part of the training images that was kept for choosing; the outlined setting was chosen and "
        "then trained on all of them. The data measured on had no say."
    )
    drawn = tag("div", tag("table", tag("thead", head), tag("tbody", *body), class_="tried"), class_="table")
    return [tag("h3", "What was tried"), tag("p", says, class_="says"), drawn]


def _row_name(one: Mapping[str, Any], axis: str | None) -> str:
    layers, pooling = one.get("layers"), one.get("pooling")
    parts = []
    if layers is not None:
        parts.append("last block" if layers == 1 else f"last {layers} blocks")
    if pooling is not None:
        parts.append(_POOLING.get(str(pooling), str(pooling).replace("_", " ")))
    known = ("layers", "pooling", "validation_top1", "chosen", axis)
    parts += [f"{name.replace('_', ' ')} {value}" for name, value in one.items() if name not in known]
    return ", ".join(parts)


def _cell(one: Mapping[str, Any] | None, best: float) -> Html:
    if one is None or one.get("validation_top1") is None:
        return tag("td", "")
    value = float(one["validation_top1"])
    shade = f"--shade:{55 * (value / best) ** 3:.0f}%"  # the cube tells the good ones from each other
    says = "chosen" if one.get("chosen") else None
    return tag("td", percent(value), class_="chosen" if says else None, style=shade, title=says)


def training(details: Mapping[str, Any]) -> list[Html]:
    """The loss of the task's own training."""
    points: Sequence[Sequence[float | None]] = details.get("curve") or []
    found = [(float(step or 0), float(loss)) for step, loss in points if loss is not None and math.isfinite(loss)]
    if not found:
        return []
    curve = Curve([step for step, _ in found], [loss for _, loss in found])
    says = "Of the task's own training, not of pre-training."
    return [tag("div", chart("training loss", says, [Line("loss", curve)]), class_="charts")]
