"""Class by class: bars of every class, best first, and what was taken for what."""

from collections.abc import Mapping, Sequence
from typing import Any

from harmony.evaluation.report.charts import Bar, bars, heat_map
from harmony.evaluation.report.html import Html, folded, joined, note, table, tag

_ALL = 24
"""Up to so many classes all are shown; of more, the best and the worst, and the others when asked for."""

_EITHER_END = 10
_MOST_FOLDED = 200
_MOST_CONFUSIONS = 8


def accuracies(details: Mapping[str, Any], chance: float | None) -> list[Html]:
    """Accuracy of every class of a classification, and its confusions; nothing without classes."""
    every = details.get("classes") or []
    if not every:
        return []
    rows = [Bar(one["name"], one["top1"], f"of {one['images']:,}") for one in every]
    says = "Share of each class's images that are right" + ("; the upright stroke is chance." if chance else ".")
    parts = class_bars("Class by class", says, rows, chance)
    if details.get("confusion"):
        parts.append(_confusion(details["confusion"], [one["name"] for one in every]))
    return parts


def class_bars(title: str, says: str, rows: Sequence[Bar], chance: float | None = None) -> list[Html]:
    """Bars of classes, best first; those between the best and the worst are folded away where there are many."""
    measured = sorted((row for row in rows if row.share is not None), key=lambda row: (-(row.share or 0), row.label))
    absent = [row for row in rows if row.share is None]
    parts = [tag("h3", title), tag("p", says, class_="says")]
    if len(measured) <= _ALL:
        parts.append(_columns(measured, chance))
    else:
        best, between, worst = measured[:_EITHER_END], measured[_EITHER_END:-_EITHER_END], measured[-_EITHER_END:]
        ends = [tag("div", tag("h4", f"The best of {len(measured):,}"), bars(best, chance))]
        ends.append(tag("div", tag("h4", "The worst"), bars(worst, chance)))
        parts.append(tag("div", *ends, class_="columns"))
        if len(between) <= _MOST_FOLDED:
            parts.append(folded(f"The {len(between):,} classes between them", _columns(between, chance)))
    if absent and len(absent) <= _MOST_FOLDED:
        count = "One class has" if len(absent) == 1 else f"{len(absent):,} classes have"
        parts.append(folded(f"{count} no example to measure", _columns(absent, chance)))
    return parts


def _columns(rows: Sequence[Bar], chance: float | None) -> Html:
    return tag("div", bars(rows, chance), class_="all")


def _confusion(counts: Sequence[Sequence[int]], names: Sequence[str]) -> Html:
    """The matrix, and its largest entries off the diagonal by name."""
    says = (
        "A row is a true class, a column what it was taken for, both in the order of the data; the diagonal is right. "
        "Point at a cell to read it."
    )
    matrix = tag("figure", heat_map(counts, names), tag("figcaption", says), class_="confusion")
    pairs = [
        (names[row], names[column], count)
        for row, line in enumerate(counts)
        for column, count in enumerate(line)
        if row != column and count
    ]
    pairs.sort(key=lambda pair: -pair[2])
    most = (
        table(("true class", "taken for", "images"), pairs[:_MOST_CONFUSIONS], words=(1,))
        if pairs
        else note("None at all.")
    )
    sides = [
        tag("div", tag("h3", "Confusions"), matrix),
        tag("div", tag("h3", "The most frequent ones"), most),
    ]
    return tag("div", joined(sides), class_="confusions")
