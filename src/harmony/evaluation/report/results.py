"""The sections with results: cards, all metrics in tables, per-class bars, confusions and retrieved images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harmony.evaluation.report.charts import bars, heat_map
from harmony.evaluation.report.html import Html, Section, folded, joined, note, number, percent, picture, table, tag
from harmony.evaluation.report.words import HEADLINES, TASKS, metric
from harmony.evaluation.results import Metrics

_MOST_BARS = 80
_MOST_CONFUSIONS = 8

Details = Mapping[str, Any] | None
"""What a task kept for the report (see its `run`), or None when it was not run."""


def results(metrics: Metrics, run: Path) -> Section:
    """Headline metrics as cards, each beside its chance level, and all metrics in tables."""
    if not metrics:
        command = tag("code", f"harmony evaluate {run} --task zero_shot --data URI --out {run}")
        told = joined(["Nothing has been evaluated yet; ", command, " does it."])
        return Section("results", "Results", note(told))
    most = 4 if len(metrics) == 1 else 2
    cards = []
    for task, numbers in metrics.items():
        names = [name for name in HEADLINES.get(task, tuple(numbers)) if name in numbers]
        cards += [_card(task, name, numbers) for name in names[:most]]
    tables = [tag("div", tag("h3", TASKS.get(task, task)), _all(numbers)) for task, numbers in metrics.items()]
    every = folded("All metrics", tag("div", *tables, class_="columns"))
    return Section("results", "Results", joined([tag("div", *cards, class_="cards"), every]))


def _card(task: str, name: str, numbers: Mapping[str, float]) -> Html:
    value, chance = numbers[name], numbers.get(f"chance_{name}")
    parts = [
        tag("span", TASKS.get(task, task), class_="of"),
        tag("span", percent(value), class_="big"),
        tag("span", metric(name)),
    ]
    if chance is not None:
        fill, mark = tag("i", style=f"width:{100 * value:.2f}%"), tag("b", style=f"left:{100 * chance:.2f}%")
        parts.append(tag("span", fill, mark, class_="track"))
        parts.append(tag("span", _beside_chance(value, chance), class_="chance"))
    return tag("div", *parts, class_="card")


def _beside_chance(value: float, chance: float) -> str:
    ratio = value / chance if chance else 0
    if ratio < 1.05:
        return f"chance is {percent(chance)}"
    return f"{ratio:,.{0 if ratio >= 9.5 else 1}f} times the chance of {percent(chance)}"


def _all(numbers: Mapping[str, float]) -> Html:
    rows = []
    for name, value in numbers.items():
        if not name.startswith("chance_"):
            chance = numbers.get(f"chance_{name}")
            rows.append((metric(name), _written(name, value), "" if chance is None else percent(chance)))
    return table(("metric", "value", "chance"), rows)


def _written(name: str, value: float) -> str:
    """Shares as percentages; counts and ranks as they are."""
    is_share = isinstance(value, float) and 0 <= value <= 1 and "rank" not in name
    return percent(value) if is_share else number(value)


def classes(details: Details, metrics: Mapping[str, float]) -> Section | None:
    """Accuracy of every class, best first, and what was taken for what."""
    if not details or not details.get("classes"):
        return None
    ordered = sorted(details["classes"], key=lambda one: (one["top1"] is None, -(one["top1"] or 0), one["name"]))
    shown = ordered if len(ordered) <= _MOST_BARS else ordered[: _MOST_BARS // 2] + ordered[-_MOST_BARS // 2 :]
    rows = [(one["name"], one["top1"], f"of {one['images']:,}") for one in shown]
    lead = (
        "Share of each class's images that zero-shot classification gets right, with "
        f"{len(details.get('templates', []))} prompts a class; the upright stroke is chance."
    )
    if len(shown) < len(ordered):
        lead += f" The best and the worst {_MOST_BARS // 2} of {len(ordered):,} classes."
    parts = [tag("div", bars(rows, metrics.get("chance_top1")), class_="all")]
    if details.get("confusion"):
        parts.append(_confusion(details["confusion"], [one["name"] for one in details["classes"]]))
    return Section("classes", "Class by class", joined(parts), lead)


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
    most = table(("true class", "taken for", "images"), pairs[:_MOST_CONFUSIONS]) if pairs else note("None at all.")
    return tag(
        "div",
        tag("div", tag("h3", "Confusions"), matrix),
        tag("div", tag("h3", "The most frequent ones"), most),
        class_="confusions",
    )


def retrievals(details: Details, pictures: Mapping[int, str]) -> Section | None:
    """Captions as queries: the best and the worst, with the five images that come first.

    Args:
        details: what the retrieval task kept.
        pictures: position in the source -> data URI.
    """
    found = (details or {}).get("text_to_image")
    if not found:
        return None
    title = "Captions and what they find"
    if not pictures:
        return Section("retrievals", title, note("The images are no longer where they were evaluated."))
    parts: list[Html] = []
    for kind, heading in (("best", "Found with most confidence"), ("worst", "Furthest off")):
        queries = [_query(query, pictures) for query in found.get(kind, [])]
        parts += [tag("h3", heading), tag("div", *queries, class_="queries")] if queries else []
    lead = (
        "Each caption with the five images most similar to it; its own image is outlined. "
        "Where that is not among the five, it stands behind the dots."
    )
    return Section("retrievals", title, joined(parts), lead)


def shown_images(details: Details) -> list[int]:
    """Positions of all images that `retrievals` would like to show."""
    found = (details or {}).get("text_to_image") or {}
    queries = [query for kind in ("best", "worst") for query in found.get(kind, [])]
    return sorted({query["image"] for query in queries} | {one["image"] for query in queries for one in query["first"]})


def _query(query: Mapping[str, Any], pictures: Mapping[int, str]) -> Html:
    own, first = query["image"], query["first"]
    shown = [_hit(one["image"], one["image"] == own, f"similarity {one['similarity']:.2f}", pictures) for one in first]
    if all(one["image"] != own for one in first):
        shown += [tag("span", "…", class_="dots"), _hit(own, True, f"rank {query['rank']:,}", pictures)]
    rank = "found first" if query["rank"] == 1 else f"rank {query['rank']:,} of {query['pool']:,}"
    caption = tag("p", tag("q", query["caption"]), " ", tag("small", rank))
    return tag("div", caption, tag("div", *shown, class_="strip"), class_="query")


def _hit(image: int, right: bool, says: str, pictures: Mapping[int, str]) -> Html:
    if image not in pictures:
        return tag("span", "not readable", class_="lost")
    alt = f"{'own image' if right else 'another image'}, {says}"
    return tag("span", picture(pictures[image], alt, class_="own" if right else None), title=says)
